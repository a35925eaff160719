"""The annotations of options: what each of them refuses, and that every registered class has them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import pytest

from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.foreign.values import quoted
from vllm_kvevict.policies import ODD, POLICIES, EvictionPolicy, above, at_least, between
from vllm_kvevict.policies.options import check_options

if TYPE_CHECKING:
    from nowhere import Unknown

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = ["4", True, False, None, NAN, INF, -INF, [4], 1j]


@dataclass(frozen=True)
class Sample:
    whole: int = 3
    number: float = 0.5
    flag: bool = False
    text: str = "a"
    choice: Literal["mean", "max", "sum"] = "mean"
    level: Literal[1, 2] = 1
    least: Annotated[int, at_least(2)] = 3
    weight: Annotated[float, at_least(0)] = 0.5
    positive: Annotated[float, above(0)] = 0.5
    share: Annotated[float, between(0, 1)] = 0.5
    odd: Annotated[int, ODD, at_least(1)] = 3
    maybe: Annotated[int, at_least(2)] | None = None
    outside: Annotated[int | None, at_least(2)] = None
    several: Literal["auto"] | Annotated[float, above(0)] | None = None
    name: ClassVar[str] = "sample"

    def __post_init__(self) -> None:
        check_options(self)


EXPECTED = {
    "whole": ("a whole number", [1.0, 2**63, -(2**63) - 1, *NO_NUMBERS]),
    "number": ("a number", [10**400, *NO_NUMBERS]),
    "flag": ("true or false", [0, 1, None, "yes", NAN]),
    "text": ("a text", [1, None, b"a", ["a"]]),
    "choice": ("'mean', 'max' or 'sum'", ["min", "", None, 1, [], NAN]),
    "level": ("1 or 2", [0, 3, True, 1.0, "1", None]),
    "least": ("a whole number of at least 2", [1, 0, -2, 2.0, 2**63, *NO_NUMBERS]),
    "weight": ("a number of at least 0", [-1, -0.5, *NO_NUMBERS]),
    "positive": ("a number above 0", [0, 0.0, -0.0, -1, *NO_NUMBERS]),
    "share": ("a number from 0 to 1", [-0.5, 1.5, 2, -1, *NO_NUMBERS]),
    "odd": ("an odd number of at least 1", [0, 2, -3, 3.0, *NO_NUMBERS]),
    "maybe": ("a whole number of at least 2 or None", [1, 2.0, "2", True, NAN, INF]),
    "outside": ("a whole number of at least 2 or None", [1, 2.0, "2", True, NAN, INF]),
    "several": ("'auto', a number above 0 or None", [0, -0.5, "outo", True, NAN, INF]),
}
ALLOWED = {
    "whole": [0, -7, 2**63 - 1, -(2**63)],
    "number": [0, 7, -0.5, 1e308],
    "flag": [True, False],
    "text": ["", "b"],
    "choice": ["mean", "max", "sum"],
    "level": [1, 2],
    "least": [2, 2**63 - 1],
    "weight": [0, 0.0, 1, 1e308],
    "positive": [5e-324, 1],
    "share": [0, 0.0, 0.5, 1, 1.0],
    "odd": [1, 7],
    "maybe": [2, None],
    "outside": [2, None],
    "several": ["auto", 0.5, 3, None],
}


def refusal(cls: Any, **options: object) -> str:
    with pytest.raises(ValueError) as error:
        cls(**options)
    return str(error.value)


@pytest.mark.parametrize("option", EXPECTED)
def test_what_an_annotation_does_not_allow_is_refused_in_one_sentence(option: str) -> None:
    expected, wrong = EXPECTED[option]
    for value in wrong:
        assert refusal(Sample, **{option: value}) == f"sample.{option}: expected {expected}, got {quoted(value)}"


@pytest.mark.parametrize("option", ALLOWED)
def test_what_it_allows_is_taken(option: str) -> None:
    for value in ALLOWED[option]:
        assert getattr(Sample(**{option: value}), option) is value


def test_a_subclass_with_another_default_keeps_the_bounds_unless_it_states_others() -> None:
    @dataclass(frozen=True)
    class Longer(Sample):
        least: int = 64
        weight: Annotated[float, above(-1)] = 0.25

    assert refusal(Longer, least=1) == "sample.least: expected a whole number of at least 2, got 1"
    assert Longer(weight=-0.5).weight == -0.5
    assert refusal(Longer, weight=-1) == "sample.weight: expected a number above -1, got -1"
    assert refusal(Sample, weight=-0.5) == "sample.weight: expected a number of at least 0, got -0.5"


def test_annotations_of_other_kinds_are_left_to_the_class() -> None:
    @dataclass(frozen=True)
    class Free(Sample):
        sizes: list[int] = field(default_factory=list)
        anything: Any = None
        layers: tuple[int, ...] | int = 0
        sloppy: int = None  # type: ignore[assignment]

    assert Free(sizes=["a"], anything=NAN, layers="all").sizes == ["a"]  # type: ignore[list-item,arg-type]
    assert refusal(Free, sloppy="a") == "sample.sloppy: expected a whole number, got 'a'"


def test_an_annotation_that_cannot_be_read_spoils_no_other() -> None:
    @dataclass(frozen=True)
    class Typed(Sample):
        unknown: Unknown | None = None
        least: int = 64
        most: Annotated[int, at_least(1)] = 64

    assert Typed(unknown="a").unknown == "a"
    assert refusal(Typed, most=0) == "sample.most: expected a whole number of at least 1, got 0"
    assert refusal(Typed, least=1) == "sample.least: expected a whole number of at least 2, got 1"


def test_a_third_party_checks_its_options_by_itself_or_lets_the_base_class() -> None:
    @dataclass(frozen=True)
    class Annotations(EvictionPolicy):
        half_life: Annotated[float, above(0)] = 8.0

        def score(self, inputs: Any) -> Any: ...

        def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
            return 0

    @dataclass(frozen=True)
    class Handwritten(Annotations):
        half_life: int = 8

        def __post_init__(self) -> None:
            if self.half_life == 7:
                raise ValueError("handwritten.half_life: expected another number, got 7")

    assert refusal(Annotations, half_life=0) == "Annotations.half_life: expected a number above 0, got 0"
    assert Handwritten(half_life=0.5).half_life == 0.5  # type: ignore[arg-type]
    assert refusal(Handwritten, half_life=7) == "handwritten.half_life: expected another number, got 7"


REGISTERED = {name: POLICIES.get(name) for name in POLICIES.names()}
REGISTERED |= {f"{name} (allocator)": ALLOCATORS.get(name) for name in ALLOCATORS.names()}
OPTIONS = [(cls, option.name) for cls in REGISTERED.values() for option in fields(cls)]


def kinds(cls: type, option: str) -> set[Any]:
    hint = get_type_hints(cls)[option]
    return {hint, *get_args(hint)}


def named(cls: Any, option: str) -> str:
    return f"{cls.name}.{option}: expected "


@pytest.mark.parametrize(("cls", "option"), OPTIONS, ids=[f"{cls.name}-{option}" for cls, option in OPTIONS])
def test_every_registered_class_refuses_what_an_option_cannot_be(cls: Any, option: str) -> None:
    if {int, float} & kinds(cls, option):
        for value in ("4", True, NAN, INF, -1):
            assert refusal(cls, **{option: value}).startswith(named(cls, option))
    if bool in kinds(cls, option):
        assert refusal(cls, **{option: 1}).startswith(named(cls, option))
    assert refusal(cls, **{option: object()}).startswith(named(cls, option))


@pytest.mark.parametrize("name", REGISTERED)
def test_messages_call_a_class_as_users_do(name: str) -> None:
    assert REGISTERED[name].name == name.removesuffix(" (allocator)")
