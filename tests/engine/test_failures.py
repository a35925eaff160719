"""A policy or an allocator that raises: its request ends with an error, the engine and all other requests go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.engine import EngineCoreOutput

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.budgets import ALLOCATORS, BudgetAllocator
from vllm_kvevict.policies import POLICIES, EvictionPolicy, Need, ScoreInputs, StepInputs


@dataclass(frozen=True)
class _Failing(EvictionPolicy):
    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 0

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        raise ZeroDivisionError("a bug in somebody's policy")


@dataclass(frozen=True)
class _FailingEarly(_Failing):
    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.ALL_QUERIES})

    def observe(self, state: Any, inputs: ScoreInputs) -> Any:
        raise ZeroDivisionError("a bug in somebody's policy")


@dataclass(frozen=True)
class _WrongShape(_Failing):
    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return torch.zeros(inputs.num_kv_heads, 3)


@dataclass(frozen=True)
class _FailingLate(_Failing):
    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return torch.zeros(inputs.num_kv_heads, inputs.kv_len)

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        if int(inputs.num_tokens.min()) >= 705:
            raise ZeroDivisionError("a bug in somebody's policy")
        return inputs.positions.float()


@dataclass(frozen=True)
class _FailingAllocator(BudgetAllocator):
    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("a bug in somebody's allocator")


FAILURES = [
    {"kv_eviction": "failing"},
    {"kv_eviction": "failing_early"},
    {"kv_eviction": "wrong_shape"},
    {"kv_budget_allocator": "failing"},
]


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    policies = {"failing": _Failing, "failing_early": _FailingEarly, "wrong_shape": _WrongShape, "late": _FailingLate}
    POLICIES._classes |= policies
    ALLOCATORS._classes["failing"] = _FailingAllocator
    try:
        with engine(tiny_llama, budget=96, max_num_batched_tokens=256) as started:
            started.poison_unowned_memory()
            yield started
    finally:
        for name in policies:
            del POLICIES._classes[name]
        del ALLOCATORS._classes["failing"]


ON_V1 = pytest.mark.more_on_v2("on V1 policies fail in this way, too")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(FAILURES[0], marks=pytest.mark.smoke),
        pytest.param(FAILURES[1], marks=ON_V1),
        pytest.param(FAILURES[2], marks=ON_V1),
        FAILURES[3],
    ],
    ids=str,
)
def test_only_the_request_of_a_failing_policy_ends(running: Engine, options: dict[str, str]) -> None:
    prompts = [random_prompt(400 + index, seed=index) for index in range(3)]
    expected = running.tokens(prompts, skip_reading_prefix_cache=True)
    ids = [running.add(prompts[0]), running.add(random_prompt(700, seed=9), extra_args=options)]
    ids += [running.add(prompt) for prompt in prompts[1:]]
    outputs = running.run()
    failed = outputs[ids[1]].outputs[0]
    assert failed.finish_reason == "error" and len(failed.token_ids) <= 1
    answers = [list(outputs[request_id].outputs[0].token_ids) for request_id in ids]
    assert [answers[0], *answers[2:]] == expected
    running.check_all_free()


def test_the_client_of_a_failed_request_hears_why(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    if "error" not in EngineCoreOutput.__struct_fields__:
        pytest.skip("an engine of this vLLM tells its clients no reason")
    errors, update = [], running.scheduler.update_from_output

    def noting(*args: Any) -> Any:
        outputs = update(*args)
        errors.extend(output.error for of_client in outputs.values() for output in of_client.outputs)
        return outputs

    monkeypatch.setattr(running.scheduler, "update_from_output", noting)
    running.generate([random_prompt(700, seed=9)], extra_args=FAILURES[0])
    (error,) = filter(None, errors)
    assert error.message == "the KV eviction of this request failed; the server's log says why" and not error.retryable


def test_a_policy_that_fails_token_by_token_ends_its_requests_at_once(running: Engine) -> None:
    options = {"kv_eviction": "late", "kv_evict_during_decode": 1, "kv_evict_interval": 1}
    (expected,) = running.tokens([random_prompt(300, seed=1)], max_tokens=40)
    other = running.add(random_prompt(300, seed=1), max_tokens=40)
    failing = running.add(random_prompt(700, seed=9), max_tokens=40, extra_args=options)
    outputs = running.run()
    assert outputs[failing].outputs[0].finish_reason == "error"
    assert 5 <= len(outputs[failing].outputs[0].token_ids) <= 7
    assert list(outputs[other].outputs[0].token_ids) == expected
    running.check_all_free()


def test_what_a_failed_request_has_computed_can_be_hit(running: Engine) -> None:
    """Its whole blocks were never rewritten."""
    prompt = random_prompt(700, seed=21)
    (cold,) = running.tokens([prompt], skip_reading_prefix_cache=True)
    (failed,) = running.generate([prompt], extra_args=FAILURES[0])
    assert failed.outputs[0].finish_reason == "error"
    assert running.tokens([prompt]) == [cold]
