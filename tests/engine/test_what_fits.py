"""What is accepted is served: requests alone in a cache, in engines without a model (tests/engine/simulated.py)."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError

from tests.conftest import USES_V2_RUNNER
from tests.engine.simulated import BLOCK, WINDOW, Setting, SimulatedEngine
from tests.tiny_llama import random_prompt
from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.engine.scheduler import scheduler


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of engines have nothing to say that a failing test should show."""
    logger = logging.getLogger("vllm")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


NUM_CASES = 30 if USES_V2_RUNNER else 100  # engines of both runners are among them
SERVED, REFUSED, NOT_STARTED = "served", "refused", "not started"


@dataclass(frozen=True)
class Ask:
    """One request.

    length:  of its prompt, in tokens
    options: its ``vllm_xargs``
    embeds:  whether the prompt is embeddings
    repeats: how often it is asked, one after another; later ones may find their prompt in the prefix cache
    """

    length: int
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    embeds: bool = False
    repeats: int = 1

    def add(self, engine: SimulatedEngine) -> str:
        prompt = torch.ones(self.length, 4) if self.embeds else random_prompt(self.length, seed=1)
        return engine.add(prompt, max_tokens=self.max_tokens, extra_args=self.options)


class NeedsMoreError(Exception):
    """A request was refused, since the cache is too small for it.

    num_blocks: that it needs, says the message
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks


def run_alone(engine: SimulatedEngine, ask: Ask, small_after: int | None = None) -> None:
    """Run a request to its end, and a small one that comes ``small_after`` turns later, or behind its end.

    Raises NeedsMoreError if it is refused for its size, VLLMValidationError for its options.
    """
    setting = engine.setting
    try:
        big = ask.add(engine)
    except VLLMValidationError as error:
        needed = re.search(r"needs (\d+) blocks", str(error))
        if needed is None:
            raise
        raise NeedsMoreError(int(needed[1])) from None
    longest = min(ask.max_tokens, setting.max_model_len - ask.length)
    chunk = min(setting.max_num_batched_tokens, setting.long_prefill_token_threshold or setting.max_num_batched_tokens)
    small, answer = None, engine.answers[big]
    most_turns = 2 * engine.batch_queue_size * (cdiv(ask.length, chunk) + longest + 10)
    patience = engine.batch_queue_size * (cdiv(ask.length + longest, chunk) + 10)  # until the next token
    silent_since = 0
    for turn in range(most_turns):
        if answer.finish_reason is not None or turn - silent_since > patience:
            break
        if turn == small_after:
            small = engine.add(random_prompt(5, seed=2), max_tokens=3)
        num_tokens = len(answer.tokens)
        engine.advance()
        if len(answer.tokens) > num_tokens:
            silent_since = turn
    assert answer.finish_reason is not None, f"{ask} does not end: {describe(engine)}"
    assert answer.finish_reason == "length", answer
    if len(answer.tokens) < longest:
        # the answer has outgrown the cache, not what is planned for it
        num_groups = len(engine.scheduler.kv_cache_config.kv_cache_groups)
        # after a preemption it starts again, and then a window holds what is in flight as well
        in_window = cdiv(WINDOW - 1 + engine.vllm_config.max_in_flight_tokens, BLOCK) + 1
        slack = 1 + engine.batch_queue_size * num_groups + in_window * (num_groups - 1)
        assert engine.max_held >= engine.num_usable_blocks - slack, f"{ask} has ended early: {describe(engine)}"
    small = small or engine.add(random_prompt(5, seed=2), max_tokens=3)
    assert engine.run(20 * engine.batch_queue_size), f"behind {ask} nothing goes on: {describe(engine)}"
    assert len(engine.answers[small].tokens) == 3
    engine.check_all_free()


def describe(engine: SimulatedEngine) -> str:
    requests = [
        f"{request.request_id} {request.status.name}: {request.num_tokens} tokens, {request.num_computed_tokens} "
        f"computed, preempted {request.num_preemptions} times"
        for request in engine.requests.values()
    ]
    return f"{engine.num_free_blocks} of {engine.num_usable_blocks} blocks are free; {'; '.join(requests)}"


def serve(model: Path, setting: Setting, ask: Ask, small_after: int | None = None) -> str:
    """Return what becomes of a request. One that is refused has to be served by a cache of the size that it is told."""
    try:
        engine = SimulatedEngine(model, setting)
    except ValueError:
        return NOT_STARTED
    try:
        for _ in range(ask.repeats):
            run_alone(engine, ask, small_after)
    except NeedsMoreError as refusal:
        assert refusal.num_blocks > setting.num_blocks - 1
        larger = replace(setting, num_blocks=refusal.num_blocks + 1)  # vLLM's null block
        run_alone(SimulatedEngine(model, larger), ask, small_after)
        return REFUSED
    return SERVED


def smallest_cache(model: Path, setting: Setting) -> Setting | None:
    """Return ``setting`` with the fewest blocks that start-up accepts; None if it accepts no number of them."""

    def starts(num_blocks: int) -> bool:
        try:
            SimulatedEngine(model, replace(setting, num_blocks=num_blocks))
        except ValueError:
            return False
        return True

    low, high = 1, 1024
    if not starts(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if starts(middle) else (middle, high)
    return replace(setting, num_blocks=high)


BOUNDED = {"policy": "snapkv", "budget": 96, "during_prefill": True, "max_num_seqs": 16}
WIDE = {"policy": "snapkv", "budget": 256, "during_prefill": True}
NONE, AT_THE_END = {"kv_eviction": "none"}, {"kv_evict_during_prefill": 0}
WAYS = {
    "sync": {},
    "async": {"async_scheduling": True},
    "async on V2": {"async_scheduling": True, "uses_v2_runner": True},
    "stages": {"num_stages": 3},
    "async stages": {"num_stages": 2, "async_scheduling": True, "uses_v2_runner": True},
}


with_and_without_caching = pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])


ON_V1 = pytest.mark.more_on_v2("on V1 engines of both runners run in every way, on V2 those that a GPU has")


@pytest.mark.parametrize(
    "way", [*(pytest.param(way, marks=() if "uses_v2_runner" in WAYS[way] else ON_V1) for way in WAYS)]
)
class TestOneRequestBlocksTheQueue:
    """Faults B1 to B4 of issue 21: the inputs with which they were found."""

    @with_and_without_caching
    @pytest.mark.parametrize(
        ("setting", "ask"),
        [
            (Setting(30, BOUNDED), Ask(2000, 5, {"kv_budget": 512})),
            (Setting(26, WIDE, max_model_len=4096), Ask(1000, 4, {"kv_budget": 384})),
            (Setting(26, WIDE, max_model_len=4096), Ask(1000, 4, {"kv_budget": 0.5})),
        ],
    )
    def test_check_and_admission_agree_on_larger_budgets(
        self, tiny_llama: Path, way: str, caching: bool, setting: Setting, ask: Ask
    ) -> None:
        setting = replace(setting, enable_prefix_caching=caching, **WAYS[way])
        assert serve(tiny_llama, setting, ask, small_after=0) in (SERVED, REFUSED)

    @pytest.mark.parametrize(
        ("setting", "ask"),
        [
            (Setting(30, BOUNDED), Ask(700, 1000, NONE)),
            (Setting(30, BOUNDED), Ask(700, 1000, NONE, embeds=True)),
            (Setting(30, BOUNDED), Ask(700, 1000, {"kv_budget": 0.9, **AT_THE_END})),
            (Setting(26, WIDE, max_model_len=4096), Ask(300, 1200, NONE)),
            (Setting(26, WIDE, max_model_len=4096), Ask(300, 1200, AT_THE_END)),
            (Setting(26, WIDE, max_model_len=4096), Ask(300, 1200, AT_THE_END, embeds=True)),
        ],
    )
    def test_an_answer_outgrows_the_cache(self, tiny_llama: Path, way: str, setting: Setting, ask: Ask) -> None:
        assert serve(tiny_llama, replace(setting, **WAYS[way]), ask, small_after=50) in (SERVED, REFUSED)

    @pytest.mark.parametrize("options", [{}, NONE, AT_THE_END, {"kv_budget": 512}])
    def test_a_prompt_of_embeddings_has_a_length(self, tiny_llama: Path, way: str, options: dict[str, Any]) -> None:
        setting = Setting(18, BOUNDED, max_num_batched_tokens=100, **WAYS[way])
        setting = replace(setting, num_blocks=max(18, smallest_cache(tiny_llama, setting).num_blocks))
        ask = Ask(1500, 5, options, embeds=True)
        assert serve(tiny_llama, setting, ask) == serve(tiny_llama, setting, replace(ask, embeds=False))

    @pytest.mark.parametrize("ask", [Ask(700, 1000, NONE), Ask(2000, 40), Ask(900, 400, {"kv_budget": 0.9})])
    def test_windows_count(self, tiny_llama: Path, way: str, ask: Ask) -> None:
        setting = smallest_cache(tiny_llama, Setting(0, BOUNDED, has_windows=True, **WAYS[way]))
        assert serve(tiny_llama, setting, ask, small_after=50) in (SERVED, REFUSED)

    @pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
    @pytest.mark.parametrize(
        ("setting", "ask"),
        [(Setting(20, BOUNDED), Ask(1500, 5)), (Setting(20, WIDE, max_model_len=4096), Ask(500, 2))],
    )
    @pytest.mark.parametrize("small_after", [None, 0], ids=["alone", "with another"])
    def test_a_lone_prompt_ignores_the_threshold(
        self, tiny_llama: Path, way: str, adaptive: bool, setting: Setting, ask: Ask, small_after: int | None
    ) -> None:
        setting = replace(
            setting,
            max_num_batched_tokens=2048,
            long_prefill_token_threshold=64,
            long_prefill_token_threshold_adaptive=adaptive,
            **WAYS[way],
        )
        serve(tiny_llama, setting, ask, small_after)  # it may not start
        assert serve(tiny_llama, smallest_cache(tiny_llama, setting), ask, small_after) == SERVED

    @with_and_without_caching
    def test_the_next_chunk_comes_before_the_blocks_of_the_last_one_are_back(
        self, tiny_llama: Path, way: str, caching: bool
    ) -> None:
        setting = Setting(17, BOUNDED, enable_prefix_caching=caching, **WAYS[way])
        serve(tiny_llama, setting, Ask(1500, 5))  # it may not start
        assert serve(tiny_llama, smallest_cache(tiny_llama, setting), Ask(1500, 5)) == SERVED

    def test_a_session_outgrows_the_cache(self, tiny_llama: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """More of its prompt comes while it waits, and in the end there is no room for that."""
        engine = SimulatedEngine(tiny_llama, Setting(26, BOUNDED, **WAYS[way]))
        warnings: list[str] = []
        monkeypatch.setattr(scheduler.logger, "warning", lambda text, *args: warnings.append(text % args))
        for turn in range(4):
            engine.answers.pop("session", None)
            engine.add(random_prompt(300, seed=turn), "session", resumable=True, max_tokens=5)
            engine.run(40 * engine.batch_queue_size)
            small = engine.add(random_prompt(40, seed=9), max_tokens=3)
            engine.run(20 * engine.batch_queue_size)
            assert len(engine.answers[small].tokens) == 3, describe(engine)
            if "session" not in engine.requests:
                break
        assert "session" not in engine.requests, describe(engine)
        assert engine.answers["session"].finish_reason == "error"  # its prompt cannot be held, let alone an answer
        assert ["streaming-input session" in text for text in warnings] == [True]  # once in all
        engine.check_all_free()

    @pytest.mark.more_on_v2("on V1 requests of both runners' engines are preempted")
    @with_and_without_caching
    @pytest.mark.parametrize("during_decode", [False, True], ids=["between chunks", "and by block"])
    def test_many_are_preempted_and_come_back(
        self, tiny_llama: Path, way: str, caching: bool, during_decode: bool
    ) -> None:
        """None of them waits for ever, and each gets all of its answer or as much as the cache can hold for it."""
        eviction = {**BOUNDED, "during_decode": during_decode}
        setting = smallest_cache(tiny_llama, Setting(0, eviction, enable_prefix_caching=caching, **WAYS[way]))
        engine = SimulatedEngine(tiny_llama, replace(setting, num_blocks=max(setting.num_blocks, 26)))
        options: list[dict[str, Any]] = [{}, NONE, AT_THE_END, {"kv_budget": 0.5}, {"kv_evict_during_decode": 1}]
        for index in range(15):
            with suppress(VLLMValidationError):
                Ask(60 + 45 * index, 300, options[index % 5], embeds=index % 4 == 3).add(engine)
        assert len(engine.answers) >= 8
        engine.run(8000)
        assert engine.num_preemptions > 0, "the test shows nothing"
        assert not engine.has_work, describe(engine)
        assert {answer.finish_reason for answer in engine.answers.values()} == {"length"}
        engine.check_all_free()


# schedule -> policies that can do it, and the fields that ask for it
AT_ONCE: dict[str, tuple[list[str], dict[str, Any]]] = {
    "at the end": (["snapkv", "h2o", "knorm", "compactor", "laq"], {}),
    "by block": (["snapkv", "morphkv", "h2o", "tova"], {"during_decode": True}),
    "by token": (["morphkv", "h2o", "tova"], {"during_decode": True, "interval": 1}),
    "deferred": (["laq_deferred"], {}),
}
# only here the cache may be smaller than the longest context
BETWEEN_CHUNKS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "between chunks": (["snapkv", "h2o", "streaming_llm", "tova"], {"during_prefill": True}),
    "and by block": (["snapkv", "tova"], {"during_prefill": True, "during_decode": True}),
    "and by token": (["h2o", "streaming_llm"], {"during_prefill": True, "during_decode": True, "interval": 1}),
}
BUDGETS = st.one_of(st.integers(64, 300), st.integers(64, 700), st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.75, 0.9]))


@st.composite
def servers(draw: st.DrawFn) -> Setting:
    schedules = draw(st.sampled_from([AT_ONCE, BETWEEN_CHUNKS, BETWEEN_CHUNKS, BETWEEN_CHUNKS]))
    policies, fields = schedules[draw(st.sampled_from([*schedules]))]
    chunk = draw(st.sampled_from([16, 33, 64, 100, 256, 2048]))
    return Setting(
        num_blocks=0,
        eviction={"policy": draw(st.sampled_from(policies)), "budget": draw(BUDGETS), **fields},
        max_model_len=draw(st.sampled_from([100, 640, 1000, 2048, 2048])),
        max_num_batched_tokens=chunk,
        long_prefill_token_threshold=draw(st.sampled_from([0, 8, 40, 200])) if chunk >= 200 else 0,
        long_prefill_token_threshold_adaptive=draw(st.booleans()),
        enable_prefix_caching=draw(st.booleans()),
        num_stages=draw(st.sampled_from([1, 1, 1, 2, 3])),
        has_windows=draw(st.sampled_from([False, False, True])),
        uses_v2_runner=draw(st.booleans()),
    )


@st.composite
def asks(draw: st.DrawFn, max_model_len: int) -> Ask:
    choices: list[dict[str, Any]] = [{}, {}, NONE, AT_THE_END, {"kv_evict_during_prefill": 1}]
    options = draw(st.sampled_from(choices))
    if draw(st.booleans()):
        options = {**options, "kv_budget": draw(BUDGETS)}
    return Ask(
        length=draw(st.one_of(st.integers(1, max_model_len - 1), st.integers(max_model_len // 2, max_model_len - 1))),
        max_tokens=draw(st.one_of(st.integers(1, 40), st.integers(1, 400), st.integers(1, 1000))),
        options=options,
        embeds=draw(st.sampled_from([False, False, False, True])),
        repeats=draw(st.sampled_from([1, 1, 2])),
    )


def _as_drawn(setting: Setting, is_async: bool) -> Setting:
    """Model runner V1 keeps no second step in flight where there are pipeline stages."""
    return replace(setting, async_scheduling=is_async, uses_v2_runner=setting.uses_v2_runner or setting.num_stages > 1)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "num_cases", [NUM_CASES, pytest.param(300, marks=pytest.mark.more("more configurations, drawn in the same way"))]
)
def test_what_is_accepted_finishes(tiny_llama: Path, is_async: bool, num_cases: int) -> None:
    """A server refuses to start; or it refuses a request, and a cache of the size that it asks for serves it; or the
    request runs alone to its end, which is its own or that of the cache.
    """
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=num_cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # to find a smaller case takes minutes, and a drawn one is small enough
        suppress_health_check=[*HealthCheck],
    )
    @given(st.data())
    def serve_one(data: st.DataObject) -> None:
        setting = _as_drawn(data.draw(servers()), is_async)
        ask = data.draw(asks(setting.max_model_len))
        smallest = smallest_cache(tiny_llama, setting)
        if smallest is None:  # the budget is too small for the policy
            outcomes[NOT_STARTED] += 1
            return
        extra = data.draw(st.one_of(st.just(0), st.integers(0, 4), st.integers(-2, 30)))
        setting = replace(smallest, num_blocks=max(smallest.num_blocks + extra, 1))
        small_after = data.draw(st.sampled_from([None, 0, 1, 30]))
        try:
            outcomes[serve(tiny_llama, setting, ask, small_after)] += 1
        except VLLMValidationError:  # options that do not go with each other
            outcomes["wrong options"] += 1

    serve_one()
    assert sum(outcomes.values()) >= num_cases, outcomes
    assert outcomes[SERVED] * 2 >= num_cases, outcomes
    assert outcomes[REFUSED], outcomes
