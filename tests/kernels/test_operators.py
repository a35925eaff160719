"""Each kernel is an operator of torch that says truly what it changes and returns, and torch.compile keeps to it."""

import pytest
import torch

from vllm_kvevict.kernels.move_tokens import move_tokens
from vllm_kvevict.kernels.self_test import Example, examples, flat


def cases() -> dict[str, Example]:
    """Each kernel and arguments for it, the same in every call."""
    return examples(torch.device("cpu"), torch.float32, num_tokens=70, head_size=16)


@pytest.mark.parametrize("name", cases())
def test_the_operator_does_what_its_schema_says(name):
    arguments = cases()[name].arguments
    operator = getattr(torch.ops.kvevict, name).default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    assert set(torch.library.opcheck(operator, tuple(flat(arguments)), test_utils=checks).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", cases())
def test_compiled_code_computes_and_changes_the_same(name):
    function, _, expected_arguments = cases()[name]
    actual_arguments = cases()[name].arguments
    expected = function(*expected_arguments)
    torch.compiler.reset()  # all cases share one lambda, which is not compiled any number of times
    actual = torch.compile(lambda *values: function(*values), fullgraph=True, backend="aot_eager")(*actual_arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for one, other in zip(flat(actual_arguments), flat(expected_arguments), strict=True):
        assert not isinstance(one, torch.Tensor) or one.equal(other)


def test_compiled_code_reads_what_was_moved():
    """A read after the move must not be taken for one before it."""

    def move_and_read(keys, values, source, destination):
        before = keys[1, 3].clone()
        move_tokens(keys, values, source, destination)
        return before, keys[1, 3] + 0

    keys, values = torch.randn(2, 2, 16, 8).unbind(0)
    moved, old = keys[0, 5].clone(), keys[1, 3].clone()
    compiled = torch.compile(move_and_read, fullgraph=True, backend="aot_eager")
    before, after = compiled(keys, values, torch.tensor([5]), torch.tensor([19]))
    assert before.equal(old)
    assert after.equal(moved)
    assert keys[1, 3].equal(moved)


def test_errors_are_those_of_the_function():
    with pytest.raises(ValueError, match=r"`keys`: expected .num_pages, block_size, head_size"):
        torch.ops.kvevict.move_tokens(torch.zeros(3), torch.zeros(3), torch.tensor([1]), torch.tensor([2]))
