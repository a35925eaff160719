"""Whatever somebody else chose is quoted in a few characters, and in no time."""

import time

import pytest

from vllm_kvevict.foreign.values import quoted


@pytest.mark.parametrize(
    "value", ["snapkv", "a'b\n", 5, -(2**64), 0.5, float("nan"), True, None, b"96", [1, "x"], {"a": 1}, {}, [], (1,)]
)
def test_short_values_are_their_repr(value):
    assert quoted(value) == repr(value)


def test_numbers_that_python_does_not_print_are_described():
    assert quoted(10**5000) == "a number of 16610 bits"
    assert quoted([10**5000]) == "[a number of 16610 bits]"


NESTED: list = []
for _ in range(10**5):
    NESTED = [NESTED]
LONG = ["x" * 10**7, b"x" * 10**7, ["y" * 10**6] * 10**5, dict.fromkeys(range(10**6), "y" * 10**6), 10**5000, NESTED]


@pytest.mark.parametrize("value", LONG, ids=["text", "bytes", "list", "dict", "number", "nested"])
def test_any_value_is_cut_at_once(value):
    began = time.perf_counter()
    assert len(quoted(value)) <= 200
    assert time.perf_counter() - began < 0.05  # seconds; sorting the keys alone takes more
