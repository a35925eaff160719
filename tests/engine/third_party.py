"""Policies and allocators that somebody else may have written: each does one thing wrong, in one of its calls.

What is drawn from the number in its name: what a policy looks at, in which method it fails, at which call, and how. The
workers of a parallel engine import this module by an entry point, as they do with plugins of vLLM; ``entry_point``.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from vllm_kvevict.budgets import ALLOCATORS, BudgetAllocator
from vllm_kvevict.policies import POLICIES, EvictionPolicy, Need, ScoreInputs, StepInputs

COUNT = 60
"""Policies, and allocators."""


class MuteError(Exception):
    """It does not even say what it is."""

    def __str__(self) -> str:
        raise ZeroDivisionError("a bug in somebody's error")

    __repr__ = __str__


class Refusal(BaseException):
    """It is no Exception: test frameworks and libraries for concurrency raise such."""


ERRORS = [
    ZeroDivisionError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    AssertionError,
    StopIteration,
    RecursionError,
    MemoryError,
    torch.OutOfMemoryError,
    MuteError,
    SystemExit,
    GeneratorExit,
    Refusal,
]
WRONG_VALUES = [None, "8", -3, 2.5, float("nan"), 200, [], (1, 2), torch.zeros(2, 3)]
NO_TENSORS = [None, "scores", 1.0, [[1.0]]]
PROPERTIES = [
    "query_window",
    "needs",
    "query_aware",
    "num_sink",
    "num_recent",
    "evicts_during_decode",
    "num_deferred",
    "num_pseudo_tokens",
    "supports_decode",
    "default_allocator",
    "layers_at_once",
]
OF_POLICIES = ["score"] * 6 + ["score_layers", "score_step", "score_step", "observe", "preselect", "__post_init__"]
OF_ALLOCATORS = ["wish", "wish", "measure", "measure", "query_window", "check_model", "__post_init__"]


@dataclass
class Fault:
    """What is wrong with a class.

    method: where
    call:   the number of the call, from 0 on
    lasts:  whether those after it fail as well
    error:  what is raised; None if something wrong is returned
    wrong:  which of the wrong things, any number
    rank:   of the only one of two workers that it is wrong on; None: of both
    """

    method: str
    call: int
    lasts: bool
    error: type[BaseException] | None
    wrong: int
    rank: int | None
    num_calls: int = 0

    is_armed: ClassVar[bool] = "KVEVICT_DISARMED" not in os.environ

    @classmethod
    def draw(cls, rng: random.Random, methods: list[str]) -> Fault:
        method = rng.choice(methods)
        # properties are asked much more often
        call = rng.choice([0, 0, 1, 2, 3, 5, 8] if method in OF_POLICIES + OF_ALLOCATORS else [0, 0, 1, 4, 12, 30])
        error = rng.choice(ERRORS) if rng.random() < 0.75 else None
        return cls(method, call, rng.random() < 0.5, error, rng.randrange(1000), rng.choice([None, 0, 1]))

    @property
    def _is_elsewhere(self) -> bool:
        has_peers = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        return has_peers and self.rank not in (None, torch.distributed.get_rank())

    def answer(self, method: str, right: Any) -> Any:
        """Return ``right``, or what is wrong instead."""
        if method != self.method or not Fault.is_armed or self._is_elsewhere:
            return right
        number, self.num_calls = self.num_calls, self.num_calls + 1
        if number != self.call and not (self.lasts and number > self.call):
            return right
        if self.error is not None:
            raise self.error("a bug in somebody's class")
        return _spoilt(right, self.wrong)


def _spoilt(right: Any, wrong: int) -> Any:
    if isinstance(right, list):
        spoilt = [right[:-1], [*right, right[0]], [_spoilt(right[0], wrong), *right[1:]], None]
    elif isinstance(right, torch.Tensor):
        nan = torch.full_like(right, float("nan")) if right.is_floating_point() else -right - 1
        infinite = torch.full_like(right, float("inf")) if right.is_floating_point() else right + 10_000
        spoilt = [nan, infinite, -nan, right[..., :-1], right[None], right.half(), right.to("meta"), right.to_sparse()]
        spoilt += [right.flatten(), right.bool(), right.expand(3, *right.shape), *NO_TENSORS]
    else:
        spoilt = WRONG_VALUES
    return spoilt[wrong % len(spoilt)]


@contextmanager
def disarmed() -> Iterator[None]:
    """Inside, nothing fails, nor in processes that are started inside."""
    Fault.is_armed, os.environ["KVEVICT_DISARMED"] = False, "1"
    try:
        yield
    finally:
        Fault.is_armed = True
        del os.environ["KVEVICT_DISARMED"]


@dataclass(frozen=True)
class ThirdPartyPolicy(EvictionPolicy):
    """Ranks by position, so that its answers do not depend on the batch. One of its options is a list."""

    fault: ClassVar[Fault]
    window: ClassVar[int]
    asks_for: ClassVar[frozenset[Need]]
    deferred: ClassVar[int]
    pseudo: ClassVar[int]
    at_once: ClassVar[int]

    options: list[Any] = field(default_factory=lambda: [1, {"layers": [2]}])

    def __post_init__(self) -> None:
        self.fault.answer("__post_init__", 0)

    @property
    def query_window(self) -> int:
        return self.fault.answer("query_window", self.window)

    @property
    def needs(self) -> frozenset[Need]:
        return self.fault.answer("needs", self.asks_for)

    @property
    def query_aware(self) -> bool:
        return self.fault.answer("query_aware", self.window > 0)

    @property
    def num_sink(self) -> int:
        return self.fault.answer("num_sink", 4)

    @property
    def num_recent(self) -> int:
        return self.fault.answer("num_recent", self.window)

    @property
    def evicts_during_decode(self) -> bool:
        return self.fault.answer("evicts_during_decode", False)

    @property
    def num_deferred(self) -> int:
        return self.fault.answer("num_deferred", self.deferred)

    @property
    def num_pseudo_tokens(self) -> int:
        return self.fault.answer("num_pseudo_tokens", self.pseudo)

    @property
    def supports_decode(self) -> bool:
        return self.fault.answer("supports_decode", not (self.deferred or self.pseudo or Need.OUTPUTS in self.asks_for))

    @property
    def default_allocator(self) -> str:
        return self.fault.answer("default_allocator", "uniform")

    @property
    def layers_at_once(self) -> int:
        return self.fault.answer("layers_at_once", self.at_once)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 0

    def observe(self, state: Any, inputs: ScoreInputs) -> Any:
        return self.fault.answer("observe", torch.zeros(inputs.num_kv_heads, inputs.kv_len))

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        return self.fault.answer("score_step", inputs.positions.float())

    def preselect(self, inputs: ScoreInputs) -> torch.Tensor:
        return self.fault.answer("preselect", torch.arange(min(16, inputs.kv_len)).expand(inputs.num_kv_heads, -1))

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        places = torch.arange(inputs.kv_len, dtype=torch.float32) * 7919 % 997
        return self.fault.answer("score", places.expand(inputs.num_kv_heads, -1).contiguous())

    def score_layers(self, layers: Sequence[ScoreInputs]) -> list[torch.Tensor]:
        return self.fault.answer("score_layers", super().score_layers(layers))


@dataclass(frozen=True)
class ThirdPartyAllocator(BudgetAllocator):
    """Gives the first layers more."""

    fault: ClassVar[Fault]
    window: ClassVar[int]

    options: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fault.answer("__post_init__", 0)

    @property
    def query_window(self) -> int:
        return self.fault.answer("query_window", self.window)

    def check_model(self, num_layers: int, num_kv_heads: int) -> None:
        self.fault.answer("check_model", 0)

    def measure(self, inputs: ScoreInputs) -> torch.Tensor:
        return self.fault.answer("measure", torch.tensor([float(inputs.layer)], dtype=torch.float64))

    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        shares = (3.0 - measures.clamp(max=2.0)).expand(-1, scores.shape[1]).contiguous()
        return self.fault.answer("wish", shares)


def _policy(number: int) -> type[ThirdPartyPolicy]:
    rng = random.Random(number)
    pseudo, deferred = rng.choice([(0, 0)] * 6 + [(4, 0), (0, 8)])
    window = 8 if deferred else rng.choice([0, 0, 1, 8])
    asks_for = rng.choice([frozenset[Need]()] * 3 + [frozenset({Need.ALL_QUERIES}), frozenset({Need.OUTPUTS})])
    looked_at = {"score_step": not (pseudo or deferred), "observe": Need.ALL_QUERIES in asks_for, "preselect": pseudo}
    methods = [name for name in OF_POLICIES if looked_at.get(name, True)]
    traits = {
        "fault": Fault.draw(rng, [*methods, *rng.sample(PROPERTIES, 8)]),
        "window": window,
        "asks_for": asks_for,
        "deferred": deferred,
        "pseudo": pseudo,
        "at_once": rng.choice([1, 2, 5]),
    }
    return type(f"ThirdPartyPolicy{number}", (ThirdPartyPolicy,), traits)


def _allocator(number: int) -> type[ThirdPartyAllocator]:
    rng = random.Random(number)
    traits = {"fault": Fault.draw(rng, OF_ALLOCATORS), "window": rng.choice([0, 8])}
    return type(f"ThirdPartyAllocator{number}", (ThirdPartyAllocator,), traits)


def names() -> list[str]:
    """Return those of the policies, which are those of the allocators, too."""
    return [f"third_party_{number}" for number in range(COUNT)]


def fault_of(options: dict[str, Any]) -> Fault | None:
    """Return what is wrong with the class that a request names, None if it names none of these."""
    for option, classes in (("kv_eviction", POLICIES._classes), ("kv_budget_allocator", ALLOCATORS._classes)):
        named = options.get(option)
        cls = classes.get(named) if isinstance(named, str) else None
        if (fault := getattr(cls, "fault", None)) is not None:
            return fault
    return None


def register() -> None:
    POLICIES._classes |= {name: _policy(number) for number, name in enumerate(names())}
    ALLOCATORS._classes |= {name: _allocator(number) for number, name in enumerate(names())}


def forget() -> None:
    for name in names():
        del POLICIES._classes[name], ALLOCATORS._classes[name]


def entry_point(folder: Path) -> Path:
    """Write what lets every process with ``folder`` on its path register these classes when it starts vLLM."""
    package = folder / "third_party-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: third_party\nVersion: 1\n")
    (package / "entry_points.txt").write_text(f"[vllm.general_plugins]\nthird_party = {__name__}:register\n")
    return folder


def how_they_fail() -> Counter[str]:
    """Return how many of the classes fail in each method."""
    classes = [POLICIES._classes[name] for name in names()] + [ALLOCATORS._classes[name] for name in names()]
    return Counter(cls.fault.method for cls in classes)  # type: ignore[attr-defined]
