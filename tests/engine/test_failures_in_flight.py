"""Async scheduling: when a failure is heard of, the step after it has been sent. It harms nobody, and ends as well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.engine.harness import Engine, async_on_cpu, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.policies import POLICIES, EvictionPolicy, Need, ScoreInputs, StepInputs

BLOCK, LAYERS = 32, 2


@dataclass(frozen=True)
class _Failing(EvictionPolicy):
    """Raises when it has been asked for ``answers`` layers."""

    answers: ClassVar[int] = 0

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 0

    def _count(self) -> None:
        if _Failing.answers == 0:
            raise ZeroDivisionError("a bug in somebody's policy")
        _Failing.answers -= 1

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        self._count()
        return torch.arange(inputs.kv_len, dtype=torch.float32).expand(inputs.num_kv_heads, -1)

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        for _ in inputs.num_tokens:
            self._count()
        return inputs.positions.float()


@dataclass(frozen=True)
class _Watching(_Failing):
    """It looks at queries, too, which the engine remembers of the answer."""

    @property
    def query_window(self) -> int:
        return 8


@dataclass(frozen=True)
class _Observing(_Failing):
    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.ALL_QUERIES})

    @property
    def supports_decode(self) -> bool:
        return True

    def observe(self, state: Any, inputs: ScoreInputs) -> Any:
        self._count()
        return torch.zeros(inputs.num_kv_heads, inputs.kv_len)


@dataclass(frozen=True)
class _Deferred(_Watching):
    @property
    def num_deferred(self) -> int:
        return 8


FAILING = {"failing": _Failing, "watching": _Watching, "observing": _Observing, "deferred": _Deferred}
CHUNKS, DECODE = {"kv_evict_during_prefill": 1}, {"kv_evict_during_decode": 1}
TOKENS = {**DECODE, "kv_evict_interval": 1}


@dataclass(frozen=True)
class Case:
    """A request that fails.

    answers:  times that its policy does not
    tokens:   of its answer, at least and at most
    """

    policy: str
    length: int
    answers: int
    options: dict[str, Any]
    tokens: tuple[int, int] = (0, 1)

    def __str__(self) -> str:
        return f"{self.policy}-{self.length}-{self.answers}-{'-'.join(self.options) or 'end'}"


CASES = [
    Case("failing", 900, 0, CHUNKS),
    Case("watching", 900, LAYERS, CHUNKS),
    Case("watching", 900, LAYERS + 1, {**CHUNKS, **DECODE}),
    Case("watching", 900, 3 * LAYERS, {**CHUNKS, **TOKENS}),
    # the prompt's last block lacks one token: the step after the failed eviction fills it
    Case("failing", 7 * BLOCK - 1, 0, DECODE),
    Case("watching", 7 * BLOCK - 1, LAYERS, DECODE, (1, 3)),
    Case("watching", 7 * BLOCK - 1, 2 * LAYERS + 1, DECODE, (32, 36)),
    # the budget holds the prompt
    Case("watching", 60, 0, DECODE, (1, 64)),
    Case("observing", 900, 0, {}),
    Case("observing", 900, LAYERS, {}),
    Case("observing", 7 * BLOCK - 1, 2 * LAYERS, DECODE, (1, 3)),
    Case("deferred", 7 * BLOCK - 9, 0, DECODE, (8, 10)),
    Case("deferred", 300, 1, {}, (8, 10)),
    Case("failing", 7 * BLOCK - 1, 1, TOKENS),
    Case("failing", 7 * BLOCK - 1, LAYERS, TOKENS, (1, 3)),
    Case("watching", 300, 6 * LAYERS - 1, TOKENS, (5, 8)),
    Case("watching", 60, 0, TOKENS, (1, 40)),
]

# of these, some are evicted at the end of their prompt, some go on, and one is never evicted
OTHERS: list[tuple[int, dict[str, Any]]] = [
    (700, {}),
    (40, {"kv_eviction": "none"}),
    (300, {"kv_eviction": "tova", **TOKENS}),
    (500, {"kv_eviction": "morphkv", **DECODE}),
]


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    POLICIES._classes |= FAILING
    try:
        with (
            async_on_cpu(),
            engine(tiny_llama, budget=96, max_num_batched_tokens=256, async_scheduling=True) as started,
        ):
            assert type(started.scheduler).__name__ == "AsyncEvictionScheduler"
            started.poison_unowned_memory()
            yield started
    finally:
        for name in FAILING:
            del POLICIES._classes[name]


@pytest.fixture(scope="module")
def drafting(tiny_llama: Path, running: Engine) -> Iterator[Engine]:
    """``running`` has the policies registered."""
    speculation = {"method": "draft_model", "model": str(tiny_llama), "num_speculative_tokens": 3}
    with (
        async_on_cpu(),
        engine(tiny_llama, budget=96, async_scheduling=True, speculative_config=speculation) as started,
    ):
        yield started


@pytest.fixture(scope="module")
def alone(running: Engine) -> list[list[int]]:
    """What each of the others is answered alone."""
    return [
        running.tokens([random_prompt(length, seed=length)], max_tokens=60, extra_args=options)[0]
        for length, options in OTHERS
    ]


# between chunks, at the end of a prompt, in an answer, late, and token by token
ON_BOTH = (0, 4, 6, 11, 15)
ON_V1 = pytest.mark.more_on_v2("on V1 a step is in flight behind more kinds of failures")


@pytest.mark.parametrize(
    "case",
    [case if index in ON_BOTH else pytest.param(case, marks=ON_V1) for index, case in enumerate(CASES)],
    ids=str,
)
def test_a_step_in_flight_behind_a_failure_harms_nobody(running: Engine, alone: list[list[int]], case: Case) -> None:
    _Failing.answers = case.answers
    ids = [
        running.add(random_prompt(length, seed=length), max_tokens=60, extra_args=options) for length, options in OTHERS
    ]
    for _ in range(3):
        running.step()
    options = {"kv_eviction": case.policy, **case.options}
    failing = running.add(random_prompt(case.length, seed=1), max_tokens=120, extra_args=options)
    outputs = running.run()
    failed = outputs[failing].outputs[0]
    assert failed.finish_reason == "error"
    assert case.tokens[0] <= len(failed.token_ids) <= case.tokens[1]
    assert [list(outputs[request_id].outputs[0].token_ids) for request_id in ids] == alone
    running.check_all_free()
    bridge = running.bridge
    running.tokens([random_prompt(40, seed=2)], max_tokens=1)  # the workers hear of the end
    assert not (len(bridge.page_table) or len(bridge.ring.slots) or bridge._watched or bridge.failures.known_to_all)


@pytest.mark.more_on_v2("V2 drafts as V1 does, and test_draft_model.py shows it")
@pytest.mark.parametrize("answers", [0, LAYERS], ids=["target", "draft"])
def test_drafts_behind_a_failure_harm_nobody(drafting: Engine, answers: int) -> None:
    """The draft is the model itself. A policy that fails in its layers costs drafts, and no answer."""
    prompts = [random_prompt(length, seed=length) for length in (700, 40)]
    alone = [drafting.tokens([prompt], max_tokens=40)[0] for prompt in prompts]
    options, prompt = {"kv_eviction": "failing"}, random_prompt(400, seed=1)
    _Failing.answers = -1
    (expected,) = drafting.tokens([prompt], max_tokens=40, extra_args=options)
    _Failing.answers = answers
    ids = [drafting.add(prompt, max_tokens=40) for prompt in prompts]
    failing = drafting.add(prompt, max_tokens=40, extra_args=options)
    outputs = drafting.run()
    assert [list(outputs[request_id].outputs[0].token_ids) for request_id in ids] == alone
    failed = outputs[failing].outputs[0]
    if answers:
        assert list(failed.token_ids) == expected
    else:
        assert failed.finish_reason == "error" and len(failed.token_ids) <= 1
    drafting.check_all_free()
    drafting.tokens([random_prompt(40, seed=2)], max_tokens=1)  # the workers hear of the end
    assert not any(
        len(bridge.page_table) or bridge._watched or bridge.failures.known_to_all for bridge in drafting.bridges
    )
