"""A policy or an allocator that raises: its request ends with an error, the engine and all other requests go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from vllm.v1.engine import EngineCoreOutput

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.budgets import ALLOCATORS, BudgetAllocator
from vllm_kvevict.budgets.auto import AutoBudget
from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.worker import bridge
from vllm_kvevict.engine.worker.likelihood import PromptLikelihood
from vllm_kvevict.eviction import allocation
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Evictions
from vllm_kvevict.eviction.resident import ResidentEvictions
from vllm_kvevict.policies import POLICIES, EvictionPolicy, Need, ScoreInputs, StepInputs
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.h2o import H2O
from vllm_kvevict.policies.laq import LookaheadQCache
from vllm_kvevict.policies.prompt_chunks import PromptChunks


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
class _WrongLate(_FailingLate):
    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        return inputs.positions.float()[..., :1]


@dataclass(frozen=True)
class _WrongSums(_FailingLate):
    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.ALL_QUERIES})

    @property
    def supports_decode(self) -> bool:
        return True

    def observe(self, state: Any, inputs: ScoreInputs) -> Any:
        return torch.zeros(inputs.num_kv_heads, inputs.kv_len - 1)


@dataclass(frozen=True)
class _WrongForLong(_WrongSums):
    def observe(self, state: Any, inputs: ScoreInputs) -> Any:
        return None if inputs.kv_len == 130 else torch.zeros(inputs.num_kv_heads, inputs.kv_len)

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return torch.zeros(inputs.num_kv_heads, inputs.kv_len)


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


@dataclass(frozen=True)
class _FailingUnprintably(_Failing):
    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        raise _Unprintable


@dataclass(frozen=True)
class _Quitting(_Failing):
    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        sys.exit("this file is missing")


CULPRIT = 130  # tokens of the prompt that the following have a bug for


def _blame(lens: Sequence[int]) -> None:
    if CULPRIT in lens:
        raise ZeroDivisionError("a bug in somebody's policy")


@dataclass(frozen=True)
class _ObservingSeveral(H2O):
    def observe_chunks(self, states: Sequence[Any], chunks: PromptChunks) -> list[Any]:
        found = super().observe_chunks(states, chunks)
        _blame(chunks.kv_lens)
        return found


@dataclass(frozen=True)
class _ForgettingOne(H2O):
    """What it returns for several is too little."""

    def observe_chunks(self, states: Sequence[Any], chunks: PromptChunks) -> list[Any]:
        return super().observe_chunks(states, chunks)[CULPRIT in chunks.kv_lens :]


@dataclass(frozen=True)
class _PreselectingSeveral(LookaheadQCache):
    def preselect_batch(self, batch: ScoreBatch) -> torch.Tensor:
        _blame([prompt.num_tokens for prompt in batch.prompts])
        return super().preselect_batch(batch)


@dataclass(frozen=True)
class _SeesTooFar(LookaheadQCache):
    """In its first layer."""

    def preselect_batch(self, batch: ScoreBatch) -> torch.Tensor:
        selected = super().preselect_batch(batch)
        for req, prompt in enumerate(batch.prompts):
            if prompt.num_tokens == CULPRIT and batch.layers[0] == 0:
                selected[req, 0, 0, 0] = CULPRIT
        return selected


@dataclass(frozen=True)
class _ScoringSeveral(LookaheadQCache):
    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        _blame([prompt.num_tokens for prompt in batch.prompts])
        return super().score_batch(batch)


@dataclass(frozen=True)
class _Ahead(_Failing):
    """It looks ahead, from tokens that the prompt does not have if ``selects_too_far``."""

    selects_too_far: ClassVar[bool] = False

    @property
    def num_pseudo_tokens(self) -> int:
        return 2

    def preselect(self, inputs: ScoreInputs) -> torch.Tensor:
        if self.selects_too_far:
            return torch.full((inputs.num_kv_heads, 4), inputs.kv_len)
        return torch.zeros(inputs.num_kv_heads, 4, dtype=torch.int64)


@dataclass(frozen=True)
class _TooFar(_Ahead):
    selects_too_far: ClassVar[bool] = True


@dataclass(frozen=True)
class _Elsewhere(_Ahead):
    """What it selects is on another device."""

    def preselect(self, inputs: ScoreInputs) -> torch.Tensor:
        return torch.zeros(inputs.num_kv_heads, 4, dtype=torch.int64, device="meta")


@dataclass(frozen=True)
class _LookingOn(EvictionPolicy):
    """It looks ahead of the prompt, and evicts the answer as well."""

    seen: ClassVar[set[tuple[int, int]]] = set()

    @property
    def query_window(self) -> int:
        return 8

    @property
    def num_pseudo_tokens(self) -> int:
        return 2

    def preselect(self, inputs: ScoreInputs) -> torch.Tensor:
        return torch.arange(4, device=inputs.keys.device).expand(inputs.num_kv_heads, -1)

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        _LookingOn.seen.add((len(inputs.query), 0 if inputs.pseudo_query is None else len(inputs.pseudo_query)))
        return torch.rand(inputs.num_kv_heads, inputs.kv_len)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads


@dataclass(frozen=True)
class _Moody(_FailingLate):
    """What it says of itself it says once."""

    said: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        if isinstance(getattr(EvictionPolicy, name, None), property):
            if name in _Moody.said:
                raise ZeroDivisionError("a bug in somebody's policy")
            _Moody.said.add(name)
        return super().__getattribute__(name)

    @property
    def supports_decode(self) -> bool:  # without a look at its needs
        return True


@dataclass(frozen=True)
class _Speechless(_Failing):
    @property
    def query_window(self) -> int:
        raise _Unprintable


@dataclass(frozen=True)
class _Listing(_FailingLate):
    """Its options have no hash. It notes of how many requests it was asked at once."""

    together: ClassVar[set[int]] = set()
    layers: list[int] = field(default_factory=lambda: [1, 2])

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        self.together.add(len(inputs.num_tokens))
        return inputs.positions.float()


@dataclass(frozen=True)
class _Seeding(_FailingLate):
    """It raises nothing."""

    seeds: ClassVar[bool] = False

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return self._seeded(torch.zeros(inputs.num_kv_heads, inputs.kv_len))

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        return self._seeded(inputs.positions.float())

    def _seeded(self, scores: torch.Tensor) -> torch.Tensor:
        if _Seeding.seeds:
            torch.manual_seed(0)
            np.random.seed(0)
            torch.set_default_device("meta")
        return scores


@dataclass(frozen=True)
class _FailingAllocator(BudgetAllocator):
    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("a bug in somebody's allocator")


@dataclass(frozen=True)
class _WrongWish(BudgetAllocator):
    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        return torch.ones(scores.shape[:2]).fill_diagonal_(float("nan"))


BY_TOKEN = {"kv_evict_during_decode": 1, "kv_evict_interval": 1}
FAILURES = [
    {"kv_eviction": "failing"},
    {"kv_eviction": "failing_early"},
    {"kv_eviction": "wrong_shape"},
    {"kv_budget_allocator": "failing"},
    {"kv_budget_allocator": "wrong"},
    {"kv_eviction": "unprintable"},
    {"kv_eviction": "quitting"},
    {"kv_eviction": "ahead"},
    {"kv_eviction": "too_far"},
    {"kv_eviction": "wrong_sums", "kv_evict_during_decode": 1},
    {"kv_eviction": "wrong_late", **BY_TOKEN},
]
POLICY_CLASSES = {
    "failing": _Failing,
    "failing_early": _FailingEarly,
    "wrong_shape": _WrongShape,
    "late": _FailingLate,
    "wrong_late": _WrongLate,
    "wrong_sums": _WrongSums,
    "wrong_for_long": _WrongForLong,
    "unprintable": _FailingUnprintably,
    "quitting": _Quitting,
    "observing_several": _ObservingSeveral,
    "forgetting_one": _ForgettingOne,
    "preselecting_several": _PreselectingSeveral,
    "sees_too_far": _SeesTooFar,
    "scoring_several": _ScoringSeveral,
    "ahead": _Ahead,
    "too_far": _TooFar,
    "elsewhere": _Elsewhere,
    "looking_on": _LookingOn,
    "moody": _Moody,
    "speechless": _Speechless,
    "listing": _Listing,
    "seeding": _Seeding,
}
ALLOCATOR_CLASSES = {"failing": _FailingAllocator, "wrong": _WrongWish}
CALIBRATION = {"snapkv": {"alpha": 10.0, "beta": -74.0}}


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    POLICIES._classes |= POLICY_CLASSES
    ALLOCATORS._classes |= ALLOCATOR_CLASSES
    fields = {"calibration": CALIBRATION}
    try:
        with engine(tiny_llama, budget=96, fields=fields, max_num_batched_tokens=256) as started:
            started.poison_unowned_memory()
            yield started
    finally:
        for name in POLICY_CLASSES:
            del POLICIES._classes[name]
        for name in ALLOCATOR_CLASSES:
            del ALLOCATORS._classes[name]


ON_V1 = pytest.mark.more_on_v2("on V1 policies fail in this way, too")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(FAILURES[0], marks=pytest.mark.smoke),
        pytest.param(FAILURES[1], marks=ON_V1),
        pytest.param(FAILURES[2], marks=ON_V1),
        FAILURES[3],
        *(pytest.param(options, marks=ON_V1) for options in FAILURES[4:]),
    ],
    ids=str,
)
def test_only_the_request_of_a_failing_policy_ends(running: Engine, options: dict[str, Any]) -> None:
    check_only_one_ends(running, options)


def check_only_one_ends(running: Engine, options: dict[str, Any]) -> None:
    """It has at most one token where the policy fails before it decodes, two where that happens in the next step."""
    prompts = [random_prompt(400 + index, seed=index) for index in range(3)]
    expected = running.tokens(prompts, skip_reading_prefix_cache=True)
    ids = [running.add(prompts[0]), running.add(random_prompt(700, seed=9), extra_args=options)]
    ids += [running.add(prompt) for prompt in prompts[1:]]
    outputs = running.run()
    failed = outputs[ids[1]].outputs[0]
    assert failed.finish_reason == "error" and len(failed.token_ids) <= 1 + ("kv_evict_interval" in options)
    answers = [list(outputs[request_id].outputs[0].token_ids) for request_id in ids]
    assert [answers[0], *answers[2:]] == expected
    running.check_all_free()


def test_sums_that_are_wrong_for_one_of_two_end_that_one(running: Engine) -> None:
    """Both prompts end in one step, and both are evicted again while they are answered."""
    options = {"kv_eviction": "wrong_for_long", "kv_evict_during_decode": 1}
    ids = [running.add(random_prompt(length, seed=length), extra_args=options) for length in (100, 130)]
    outputs = running.run()
    assert [outputs[request_id].outputs[0].finish_reason for request_id in ids] == ["length", "error"]
    running.check_all_free()


@pytest.mark.parametrize(
    ("policy", "as_written"),
    [
        ("observing_several", "h2o"),
        pytest.param("forgetting_one", "h2o", marks=ON_V1),
        ("preselecting_several", "laq"),
        pytest.param("sees_too_far", "laq", marks=ON_V1),
        pytest.param("scoring_several", "laq", marks=ON_V1),
    ],
)
def test_what_fails_for_one_of_several_prompts_ends_that_one(running: Engine, policy: str, as_written: str) -> None:
    """All of them end in one step; the others are evicted as ever."""
    lengths, options = (100, CULPRIT, 120), {"kv_eviction": policy, "kv_budget": 64}
    prompts = [random_prompt(length, seed=length) for length in lengths]
    expected = running.tokens(prompts, extra_args=options | {"kv_eviction": as_written}, skip_reading_prefix_cache=True)
    ids = [running.add(prompt, extra_args=options, skip_reading_prefix_cache=True) for prompt in prompts]
    finished = running.run()
    outputs = [finished[request_id].outputs[0] for request_id in ids]
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert [list(outputs[0].token_ids), list(outputs[2].token_ids)] == [expected[0], expected[2]]
    running.check_all_free()


@ON_V1
@pytest.mark.parametrize("function", ["AutoBudget.choose", "PromptLikelihood.observe"])
def test_a_budget_that_cannot_be_chosen_ends_its_request(
    running: Engine, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("a bug in a calibration")

    owner, name = function.split(".")
    monkeypatch.setattr({"AutoBudget": AutoBudget, "PromptLikelihood": PromptLikelihood}[owner], name, fail)
    check_only_one_ends(running, {"kv_budget": "auto"})


@pytest.mark.parametrize("policy", ["ahead", "too_far", pytest.param("elsewhere", marks=ON_V1)])
def test_pseudo_tokens_of_others_are_none_the_worse(running: Engine, policy: str) -> None:
    """Both prompts end in one step, in which their pseudo tokens are generated together."""
    prompt = random_prompt(120, seed=3)
    (expected,) = running.tokens([prompt], extra_args={"kv_eviction": "laq"}, skip_reading_prefix_cache=True)
    failing = running.add(random_prompt(110, seed=9), extra_args={"kv_eviction": policy})
    other = running.add(prompt, extra_args={"kv_eviction": "laq"}, skip_reading_prefix_cache=True)
    outputs = running.run()
    assert outputs[failing].outputs[0].finish_reason == "error"
    assert list(outputs[other].outputs[0].token_ids) == expected
    running.check_all_free()


@pytest.mark.parametrize("length", [300, 64])
def test_who_looks_ahead_of_the_prompt_may_evict_the_answer(running: Engine, length: int) -> None:
    """Of a prompt that fits its budget, the answer that outgrows it is the first that is evicted."""
    _LookingOn.seen.clear()
    options = {"kv_eviction": "looking_on", "kv_evict_during_decode": 1}
    (output,) = running.generate([random_prompt(length, seed=1)], extra_args=options, max_tokens=100, ignore_eos=True)
    assert output.outputs[0].finish_reason == "length"
    assert _LookingOn.seen == ({(8, 2), (8, 0)} if length > 96 else {(8, 0)})
    running.check_all_free()


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=ON_V1)])
def test_who_finds_no_memory_for_what_the_host_must_know_ends_alone(
    running: Engine, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Where there is none for what all of a step ask, each asks by itself."""
    to_host, calls = allocation.to_host, []

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) <= times:
            raise torch.OutOfMemoryError("no memory is left")
        return to_host(tensor)

    prompts = [random_prompt(length, seed=length) for length in (60, 110, 120)]
    options = [{"kv_eviction": "none"}, {"kv_budget_allocator": "lava"}, {"kv_budget_allocator": "global"}]
    cases = list(zip(prompts, options, strict=True))
    expected = [running.tokens([prompt], extra_args=each, skip_reading_prefix_cache=True)[0] for prompt, each in cases]
    monkeypatch.setattr(allocation, "to_host", fail)
    ids = [running.add(prompt, extra_args=each, skip_reading_prefix_cache=True) for prompt, each in cases]
    outputs = [running_output.outputs[0] for running_output in map(running.run().get, ids)]
    assert [output.finish_reason for output in outputs] == ["length", "error" if times == 2 else "length", "length"]
    answers = [list(output.token_ids) for output in outputs]
    assert [answers[0], answers[2]] == [expected[0], expected[2]]
    running.check_all_free()


@ON_V1
def test_no_memory_for_last_queries_ends_those_whose_they_are(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_last, layers = bridge.keep_last, []

    def fail(rows: Any, ran: Any, ring: Any) -> None:
        layers.append(ran.layer)
        if layers == [0, 1]:
            raise torch.OutOfMemoryError("no memory is left")
        keep_last(rows, ran, ring)

    prompt = random_prompt(60, seed=1)
    (expected,) = running.tokens([prompt], skip_reading_prefix_cache=True)
    monkeypatch.setattr(bridge, "keep_last", fail)
    ids = [running.add(prompt, skip_reading_prefix_cache=True), running.add(random_prompt(150, seed=2))]
    outputs = running.run()
    assert [outputs[request_id].outputs[0].finish_reason for request_id in ids] == ["length", "error"]
    assert list(outputs[ids[0]].outputs[0].token_ids) == expected
    running.check_all_free()


def _plans_of(evictions: Any, *arguments: Any) -> list[int]:
    return [eviction.plan.num_tokens for eviction in evictions.members]


OF_BOTH = {"kv_eviction": "h2o", "kv_evict_during_decode": 1}
# where memory may run out while tokens move: the tokens of the requests that it is about, and how one is evicted
MOVING: dict[str, tuple[type, str, Callable[..., list[int]], dict[str, Any]]] = {
    "moving": (Evictions, "compact", _plans_of, {"kv_eviction": "tova"}),
    "page lists": (
        PageTable,
        "add",
        lambda table, req_ids, pages, plans, block_ids: [plan.num_tokens for plan in plans],
        {"kv_eviction": "tova"},
    ),
    "notes": (Evictions, "note", _plans_of, OF_BOTH),
    "again": (ResidentEvictions, "compact", lambda evictions: list(evictions.num_tokens), OF_BOTH),
    "page lists again": (PageTable, "shrink", lambda table, req_ids, num_tokens, *rest: list(num_tokens), OF_BOTH),
}


@pytest.mark.parametrize("place", [pytest.param(place, marks=ON_V1 if place != "again" else ()) for place in MOVING])
@pytest.mark.parametrize("is_done", [False, True], ids=["before", "behind"])
def test_who_runs_out_of_memory_while_tokens_move_ends_alone(
    running: Engine, monkeypatch: pytest.MonkeyPatch, place: str, is_done: bool
) -> None:
    owner, name, lengths, options = MOVING[place]
    move, failed = getattr(owner, name), []

    def fail(*arguments: Any) -> Any:
        fails = max(lengths(*arguments)) >= 700
        result = move(*arguments) if is_done or not fails else None
        if fails:
            failed.append(place)
            raise torch.OutOfMemoryError("no memory is left")
        return result

    prompts = [random_prompt(400 + index, seed=index) for index in range(3)]
    expected = running.tokens(prompts, skip_reading_prefix_cache=True, max_tokens=40)
    monkeypatch.setattr(owner, name, fail)
    ids = [running.add(prompts[0], max_tokens=40)]
    failing = running.add(random_prompt(700, seed=9), extra_args=options, max_tokens=80, ignore_eos=True)
    ids += [running.add(prompt, max_tokens=40) for prompt in prompts[1:]]
    outputs = running.run()
    assert len(failed) == 1 and outputs[failing].outputs[0].finish_reason == "error"
    assert [list(outputs[request_id].outputs[0].token_ids) for request_id in ids] == expected
    running.check_all_free()


def test_a_policy_that_cannot_be_made_in_the_worker_ends_its_request(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler's process could; on the same machine it is the same cache."""
    execute_model, method = running.worker.execute_model, EvictionConfig.method

    def fail(config: EvictionConfig) -> Method:
        if config.policy == "keydiff":
            raise ZeroDivisionError("a bug in somebody's policy")
        return method(config)

    def in_worker(output: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(EvictionConfig, "method", fail)
            return execute_model(output)

    monkeypatch.setattr(running.worker, "execute_model", in_worker)
    check_only_one_ends(running, {"kv_eviction": "keydiff"})


def test_what_a_policy_says_of_itself_it_is_asked_once(running: Engine) -> None:
    """The scheduler would be where it raises the second time."""
    prompt = random_prompt(500, seed=3)
    answers = [running.tokens([prompt], extra_args={"kv_eviction": policy}) for policy in ("late", "moody", "moody")]
    assert answers[0] == answers[1] == answers[2]
    running.check_all_free()


def test_options_without_a_hash_evict_token_by_token(running: Engine) -> None:
    options = {"kv_eviction": "listing", **BY_TOKEN}
    cases = [(random_prompt(300, seed=1), {**options, "kv_budget": budget}) for budget in (96, 96, 128)]
    running.check_as_alone(cases, max_tokens=20)
    num_layers = running.bridge.pool.num_layers
    assert max(_Listing.together) == 3 * num_layers, "the same policy, whatever the budget"


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
    options = {"kv_eviction": "late", **BY_TOKEN}
    (expected,) = running.tokens([random_prompt(300, seed=1)], max_tokens=40)
    other = running.add(random_prompt(300, seed=1), max_tokens=40)
    failing = running.add(random_prompt(700, seed=9), max_tokens=40, extra_args=options)
    outputs = running.run()
    assert outputs[failing].outputs[0].finish_reason == "error"
    assert 5 <= len(outputs[failing].outputs[0].token_ids) <= 7
    assert list(outputs[other].outputs[0].token_ids) == expected
    running.check_all_free()


def test_a_policy_that_seeds_changes_no_answer_of_others(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(seeds: bool) -> list[list[int]]:
        monkeypatch.setattr(_Seeding, "seeds", seeds)
        torch.manual_seed(7)
        np.random.seed(7)
        running.add(random_prompt(300, seed=9), max_tokens=40, extra_args={"kv_eviction": "seeding", **BY_TOKEN})
        running.step()
        running.step()
        names = [running.add(random_prompt(60, seed=each), max_tokens=20, temperature=2.0) for each in (1, 2)]
        outputs = running.run()
        return [list(outputs[name].outputs[0].token_ids) for name in names]

    answers = sampled(seeds=False)
    assert sampled(seeds=True) == answers
    assert all(len(set(answer)) > 10 for answer in answers)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_budget": "x"},
        {"kv_budget": [1]},
        {"kv_budgt": 3},
        {"kv_eviction": {}},
        {"kv_eviction": "laq_deferred", "kv_evict_during_prefill": 1},
        {"kv_eviction": "speechless"},
    ],
    ids=str,
)
def test_options_that_no_front_end_has_checked_end_their_request(running: Engine, options: dict[str, Any]) -> None:
    """vLLM's front end in Rust, say, knows nothing of ours."""
    prompt = random_prompt(400, seed=1)
    (expected,) = running.tokens([prompt], skip_reading_prefix_cache=True)
    add_request = running.core.scheduler.add_request

    def unchecked(request: Any) -> None:
        if request.request_id.startswith("unchecked"):
            request.sampling_params.extra_args = options
        add_request(request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.core.scheduler, "add_request", unchecked)
        ids = [running.add(random_prompt(700, seed=9), "unchecked"), running.add(prompt)]
        outputs = running.run()
    assert outputs[ids[0]].outputs[0].finish_reason == "error"
    assert list(outputs[ids[1]].outputs[0].token_ids) == expected
    running.check_all_free()


def test_what_a_failed_request_has_computed_can_be_hit(running: Engine) -> None:
    """Its whole blocks were never rewritten."""
    prompt = random_prompt(700, seed=21)
    (cold,) = running.tokens([prompt], skip_reading_prefix_cache=True)
    (failed,) = running.generate([prompt], extra_args=FAILURES[0])
    assert failed.outputs[0].finish_reason == "error"
    assert running.tokens([prompt]) == [cold]
