"""Lookahead Q-Cache in a real engine, against an offline one in transformers; and that it leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.conftest import USES_V2_RUNNER
from tests.engine.dense_lookahead import LookaheadModel, check_kept
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.eviction.record import recorded_evictions
from vllm_kvevict.policies import POLICIES, EvictionPolicy

BUDGET = 128


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    with engine(tiny_llama, "laq", BUDGET) as started:
        started.poison_unowned_memory()
        yield started


@pytest.fixture(scope="module")
def offline(tiny_llama: Path) -> LookaheadModel:
    return LookaheadModel(tiny_llama)


@pytest.mark.parametrize(("policy", "window"), [("laq", 0), ("laq++", 8)])
@pytest.mark.parametrize("length", [161, 535] if USES_V2_RUNNER else [150, 161, 535, 1500])
def test_kept_is_what_pseudo_tokens_attend_to(
    running: Engine, offline: LookaheadModel, length: int, policy: str, window: int
) -> None:
    prompt = random_prompt(length, seed=length)
    with recorded_evictions() as records:
        running.generate([prompt], extra_args={"kv_eviction": policy})
    (record,) = records
    expected = offline.run(prompt, record.plan.num_kept_tokens)
    assert len(expected.tokens) == 8
    scores = expected.scores(window)
    torch.testing.assert_close(record.scores[..., : length - window], scores, rtol=1e-4, atol=1e-7)
    check_kept(scores, record.kept)
    running.check_all_free()


def test_requests_of_any_kind_in_one_step_are_as_alone(running: Engine) -> None:
    """Their pseudo tokens share passes, with other numbers of selected tokens."""
    policies = ["laq", "laq++", "snapkv", "laq", "none", "laq_deferred", "laq"]
    cases = [
        (random_prompt(90 + 31 * index, seed=index), {"kv_eviction": policy, "kv_budget": 65 + 32 * (index % 3)})
        for index, policy in enumerate(policies)
    ]
    running.check_as_alone(cases, max_tokens=40)


def test_near_the_end_of_the_context(running: Engine) -> None:
    """2,048 tokens: there is room for one, or for some of the pseudo tokens."""
    for length in (2044, 2047):
        (answer,) = running.tokens([random_prompt(length, seed=length)], max_tokens=8)
        assert len(answer) == 2048 - length
    running.check_all_free()


@dataclass(frozen=True)
class Replay(EvictionPolicy):
    """Scores that another eviction has found."""

    scores: ClassVar[torch.Tensor]

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 0

    def score(self, inputs: Any) -> torch.Tensor:
        return self.scores[inputs.layer]


@pytest.fixture
def replay() -> Iterator[type[Replay]]:
    POLICIES.register("replay")(Replay)
    try:
        yield Replay
    finally:
        del POLICIES._classes["replay"]


SAMPLING = [
    {},
    {"temperature": 0.8, "seed": 7, "logprobs": 5},
    {"temperature": 1.0, "seed": 3, "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("params", SAMPLING, ids=["greedy", "seed", "penalties"])
def test_pseudo_tokens_leave_no_trace(running: Engine, replay: type[Replay], params: dict[str, Any]) -> None:
    """The same tokens are kept without pseudo tokens: answers, their log-probabilities and counts are the same."""
    prompt = random_prompt(400, seed=77)
    settings = {"max_tokens": 20, "skip_reading_prefix_cache": True, **params}
    with recorded_evictions() as records:
        (ahead,) = running.generate([prompt], **settings)
    replay.scores = records[0].scores
    (plain,) = running.generate([prompt], extra_args={"kv_eviction": "replay"}, **settings)
    assert ahead.outputs == plain.outputs
    running.check_all_free()


def test_a_budget_that_holds_the_prompt_changes_nothing(running: Engine) -> None:
    prompt, before = random_prompt(100, seed=5), running.num_evictions
    params: dict[str, Any] = {"max_tokens": 30, "temperature": 0.7, "seed": 1, "logprobs": 1}
    (ours,) = running.generate([prompt], **params)
    (whole,) = running.generate([prompt], extra_args={"kv_eviction": "none"}, **params)
    assert ours.outputs[0] == whole.outputs[0]
    assert running.num_evictions == before


def test_as_many_steps_as_without(running: Engine) -> None:
    steps = []
    for policy in ("snapkv", "laq"):
        running.add(random_prompt(500, seed=2), max_tokens=20, extra_args={"kv_eviction": policy})
        steps.append(0)
        while running.llm.llm_engine.has_unfinished_requests():
            running.step()
            steps[-1] += 1
    assert steps[0] == steps[1]
