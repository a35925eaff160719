"""Nothing that a request chooses, and nothing that third-party code raises, ends the engine or harms another request.

Random requests, in little memory: over a tree of prefixes, with legal options and with wrong ones that no front end has
checked, with policies and allocators that fail in one of their calls (tests/engine/third_party.py); some are aborted,
some preempted. The engine lives, every request ends, and whoever did nothing wrong is answered as if it were alone.

KVEVICT_ISOLATION_REQUESTS and KVEVICT_ISOLATION_SEED, environment variables: how many requests, and which.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from vllm import LLM, SamplingParams

import tests.conftest  # noqa: F401  prepares the spawned process as it does this one, before vLLM is imported
from tests.conftest import USES_V2_RUNNER
from tests.engine import third_party
from tests.engine.harness import async_on_cpu, engine
from tests.engine.test_speculation import ALPHABET, NGRAM
from tests.tiny_llama import random_prompt
from vllm_kvevict import kv_eviction_args
from vllm_kvevict.engine.scheduler.managers import CacheInUse

pytestmark = pytest.mark.on_v1

NUM_REQUESTS = int(os.environ.get("KVEVICT_ISOLATION_REQUESTS", 40 if USES_V2_RUNNER else 60))
SEED = int(os.environ.get("KVEVICT_ISOLATION_SEED", 0))
BLOCK = 32
MAX_PROMPT = 1000
CALIBRATION = {"snapkv": {"alpha": 10.0, "beta": -74.0}}
SETTINGS: dict[str, Any] = {
    "budget": 96,
    "max_model_len": 1152,
    "max_num_batched_tokens": 300,
    "fields": {"calibration": CALIBRATION},
}
LITTLE_MEMORY = {"num_gpu_blocks_override": 40, "max_num_seqs": 8}
WHOLE: list[dict[str, Any]] = [
    {},
    {"kv_eviction": "none"},
    {"kv_budget": 64},
    {"kv_budget": 0.3},
    {"kv_budget": "auto"},
    {"kv_eviction": "streaming_llm", "kv_budget": 64},
    {"kv_eviction": "tova", "kv_budget": 0.4},
    {"kv_eviction": "knorm"},
    {"kv_eviction": "keydiff", "kv_budget": 0.5},
    {"kv_eviction": "random", "kv_budget": 64},
    {"kv_eviction": "curdkv"},
    {"kv_eviction": "h2o", "kv_budget": 128},
    {"kv_budget_allocator": "pyramid"},
    {"kv_eviction": "lava", "kv_budget": 128},
    {"kv_budget_allocator": "adakv", "kv_budget": 96},
]
# not with speculation
BOUNDED: list[dict[str, Any]] = [
    {"kv_eviction": "laq"},
    {"kv_eviction": "laq_deferred"},
    {"kv_evict_during_decode": 1},
    {"kv_evict_during_decode": "true", "kv_eviction": "h2o", "kv_budget": 128},
    {"kv_evict_during_decode": 1, "kv_evict_interval": 1, "kv_eviction": "morphkv", "kv_budget": 128},
    {"kv_evict_during_decode": 1, "kv_evict_interval": 1, "kv_eviction": "streaming_llm", "kv_budget": 0.3},
    {"kv_evict_during_decode": 1, "kv_evict_interval": 1, "kv_evict_during_prefill": 1, "kv_eviction": "tova"},
    {"kv_evict_during_prefill": 1},
    {"kv_evict_during_prefill": 1, "kv_evict_during_decode": 1, "kv_budget": 128},
]
# legal ones among them: which of all combinations are wrong is the engine's business
VALUES: dict[str, list[Any]] = {
    "kv_eviction": [
        "h2o",
        "tova",
        "lava",
        "none",
        "no_such",
        "",
        5,
        True,
        ["snapkv"],
        {},
        "kvpress:os:x",
        "x" * 100_000,
    ],
    "kv_budget": [64, 0.5, "auto", "x", "64", -1, 0, 1, 1.0, 2**63, 1e308, float("nan"), float("inf"), True, [64], {}],
    "kv_budget_allocator": ["pyramid", "adakv", "fixed", "no_such", 5, ["adakv"], {"adakv": 1}, "x" * 10_000],
    "kv_evict_during_decode": [1, "true", 0, "false", 2, "maybe", [], {}, float("nan")],
    "kv_evict_during_prefill": [1, "true", 0, 2, "maybe", [1], None],
    "kv_evict_interval": [1, 32, 0, -1, 7, 1.0, "1", True, [1], 2**63],
    "kv_budget_min": [0.1, 0.9, 2, "x", [], float("nan")],
    "kv_budget_max": [0.1, 0.9, 2, "x", {}],
    "kv_budgt": [1],
    "KV-eviction": ["tova"],
    "unknown": [{"kv_budget": [1]}, "kv_eviction"],
}
SCHEDULES: list[dict[str, Any]] = [
    {},
    {},
    {"kv_evict_during_decode": 1},
    {"kv_evict_during_decode": 1, "kv_evict_interval": 1},
    {"kv_evict_during_prefill": 1},
    {"kv_evict_during_prefill": 1, "kv_evict_during_decode": 1, "kv_evict_interval": 1},
]


@dataclass
class Asked:
    """A request, and how it has ended.

    has_front_end: whether its options were checked before they came to the scheduler
    alphabet:      tokens that its answer is made of; None: any
    """

    prompt: list[int]
    max_tokens: int
    options: dict[str, Any]
    has_front_end: bool = True
    alphabet: list[int] | None = None
    reason: str | None = None
    answer: list[int] = field(default_factory=list)
    was_aborted: bool = False
    was_preempted: bool = False

    @property
    def depends_on_the_batch(self) -> bool:
        """Whether it is evicted where chunks end, which others in its batch decide on."""
        return bool(self.options.get("kv_evict_during_prefill"))

    @property
    def has_failed(self) -> bool:
        return self.reason == "error"

    @property
    def has_one_answer(self) -> bool:
        """Whether it ran to its end, was evicted where a request that runs alone is, and had nothing wrong in it that
        cannot be refused.
        """
        fault = third_party.fault_of(self.options)
        is_spoilt = fault is not None and (self.has_failed or fault.error is None)
        return not (self.was_aborted or self.was_preempted or self.depends_on_the_batch or is_spoilt)


def drawn_options(rng: random.Random, legal: list[dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """Return options, and whether a front end has checked them."""
    kind = rng.random()
    if kind < 0.62:
        return rng.choice(legal), True
    if kind < 0.70:
        return {name: rng.choice(VALUES[name]) for name in rng.sample(list(VALUES), rng.randint(1, 3))}, False
    option = "kv_eviction" if kind < 0.90 else "kv_budget_allocator"
    return {**rng.choice(SCHEDULES), option: rng.choice(third_party.names()), "kv_budget": rng.choice([96, 0.3])}, False


def drawn_request(rng: random.Random, asked: list[Asked], legal: list[dict[str, Any]]) -> Asked:
    """A prompt that shares its first pieces with others, or is one that was there before; many end behind a block."""
    prompt: list[int] = []
    if asked and rng.random() < 0.25:
        prompt = rng.choice(asked).prompt
    else:
        for depth in range(rng.randint(1, 4)):
            prompt = prompt + random_prompt(rng.choice([20, 64, 130, 257]), seed=100 * depth + rng.randint(0, 1))
        if rng.random() < 0.4:
            prompt = prompt[: len(prompt) // BLOCK * BLOCK + 1] if len(prompt) > BLOCK else prompt
    options, has_front_end = drawn_options(rng, legal)
    return Asked(
        prompt[:MAX_PROMPT], rng.choice([1, 2, rng.randint(3, 60), rng.randint(3, 120)]), options, has_front_end
    )


def add(llm: LLM, name: str, asked: Asked) -> None:
    """Queue a request; one without a front end gets its options when all checks are behind it."""
    front, prompt = llm.llm_engine, {"prompt_token_ids": asked.prompt}
    params = SamplingParams(
        temperature=0.0,
        max_tokens=asked.max_tokens,
        ignore_eos=True,
        detokenize=False,
        allowed_token_ids=asked.alphabet,
    )
    if asked.has_front_end:
        params.extra_args = asked.options
        front.add_request(name, prompt, params)
        return
    request = front.input_processor.process_inputs(name, prompt, params, supported_tasks=front.get_supported_tasks())
    request.sampling_params.extra_args = asked.options
    front.add_request(name, request, request.params)


def run_at_random(
    llm: LLM,
    step: Callable[[], list[Any]],
    seed: int,
    count: int,
    legal: list[dict[str, Any]],
    alphabet: list[int] | None = None,
) -> list[Asked]:
    """Queue ``count`` requests over time and abort some. In the middle everything that runs must start again."""
    rng, scheduler = random.Random(seed), llm.llm_engine.engine_core.engine_core.scheduler
    asked: dict[str, Asked] = {}
    was_reset = False
    while len(asked) < count or llm.llm_engine.has_unfinished_requests():
        if len(asked) < count and rng.random() < 0.4:
            request = drawn_request(rng, list(asked.values()), legal)
            request.alphabet = alphabet
            name = f"request-{len(asked)}"
            asked[name] = request
            add(llm, name, request)
        waiting = [name for name, one in asked.items() if one.reason is None and not one.was_aborted]
        if waiting and rng.random() < 0.02:
            name = rng.choice(waiting)
            llm.llm_engine.abort_request([name])
            asked[name].was_aborted = True
        if len(asked) > count // 2 and len(scheduler.running) > 1 and not was_reset:
            was_reset = llm.reset_prefix_cache(reset_running_requests=True)
        for output in step():
            if output.finished:
                one = asked[output.request_id]
                one.reason, one.answer = output.outputs[0].finish_reason, list(output.outputs[0].token_ids)
        for request in scheduler.requests.values():
            if request.num_preemptions:
                # vLLM's own ids are the given ones with a suffix
                asked[request.request_id.rpartition("-")[0]].was_preempted = True
    return list(asked.values())


def check_ends(asked: list[Asked]) -> None:
    """Every request has ended, with an error only if something of its own was wrong."""
    for one in asked:
        assert one.was_aborted or one.reason in ("length", "error"), one
        assert not (one.has_failed and one.has_front_end), one
        assert one.has_failed or one.was_aborted or len(one.answer) == one.max_tokens, one


def check_answers(asked: list[Asked], alone: LLM, takes_more: bool = False) -> int:
    """Each request is answered, or refused, as by a fresh engine, alone, where nothing of a third party fails.

    takes_more: whether that engine takes options that the other one refuses

    Return how many answers were compared.
    """
    known: dict[str, tuple[bool, list[int]]] = {}
    num_compared = 0
    for one in asked:
        if not one.has_one_answer or (one.has_failed and takes_more):
            continue
        key = repr((one.prompt, one.max_tokens, one.options))
        if key not in known:
            known[key] = answer_alone(one, alone)
        if one.has_failed != known[key][0] and one.max_tokens == 1:
            continue  # vLLM ends what is refused after a step, whose token may have ended it before
        assert (one.has_failed, [] if one.has_failed else one.answer) == known[key], one.options
        num_compared += not one.has_failed
    return num_compared


def answer_alone(one: Asked, alone: LLM) -> tuple[bool, list[int]]:
    """Return whether a request fails, and its answer if it does not."""
    add(alone, "alone", one)
    outputs = []
    while alone.llm_engine.has_unfinished_requests():
        outputs += alone.llm_engine.step()
    output = outputs[-1]
    has_failed = output.outputs[0].finish_reason == "error"
    return has_failed, [] if has_failed else list(output.outputs[0].token_ids)


def check(asked: list[Asked], seconds: float, fresh: AbstractContextManager[LLM], takes_more: bool = False) -> None:
    """See ``check_ends`` and ``check_answers``; print what there was of everything."""
    check_ends(asked)
    with third_party.disarmed(), fresh as alone:
        num_compared = check_answers(asked, alone, takes_more)
    counts = {
        "requests": len(asked),
        "failed": sum(one.has_failed for one in asked),
        "refused": sum(one.has_failed and third_party.fault_of(one.options) is None for one in asked),
        "aborted": sum(one.was_aborted for one in asked),
        "preempted": sum(one.was_preempted for one in asked),
        "compared": num_compared,
    }
    print(", ".join(f"{count} {name}" for name, count in counts.items()), f"in {seconds:.0f} s")
    assert num_compared >= len(asked) // 2
    assert counts["failed"] >= len(asked) // 10
    assert counts["preempted"]


@contextmanager
def one_worker(model: Path) -> Iterator[LLM]:
    with engine(model, **SETTINGS, enable_prefix_caching=False) as running:
        yield running.llm


@contextmanager
def two_workers(model: Path, **settings: Any) -> Iterator[LLM]:
    values = {name: value for name, value in SETTINGS.items() if name not in ("budget", "fields")}
    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        enforce_eager=True,
        seed=0,
        dtype="float32",
        kv_cache_memory_bytes=32 << 20,
        tensor_parallel_size=2,
        **values,
        **settings,
        **kv_eviction_args("snapkv", SETTINGS["budget"], max_num_seqs=16, **SETTINGS["fields"]),
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def served(
    model: Path,
    count: int,
    legal: list[dict[str, Any]],
    alphabet: list[int] | None = None,
    **settings: Any,
) -> tuple[list[Asked], float]:
    """Run random requests on an engine whose memory is checked after every step; return them, and the seconds."""
    is_async = settings.get("async_scheduling", False)
    third_party.register()
    with (
        async_on_cpu() if is_async else nullcontext(),
        engine(model, **SETTINGS, **LITTLE_MEMORY, **settings) as running,
    ):
        assert type(running.scheduler).__name__.startswith("Async") == is_async
        running.poison_unowned_memory()
        start = perf_counter()
        asked = run_at_random(running.llm, running.step, SEED, count, legal, alphabet)
        seconds = perf_counter() - start
        running.check_all_free()
        running.tokens([random_prompt(40, seed=2)], max_tokens=1)  # the workers hear of the last ends
        for bridge in running.bridges:
            assert not (len(bridge.page_table) or len(bridge.ring.slots))
            assert not (bridge._watched or bridge.failures.known_to_all)
    return asked, seconds


@pytest.fixture(autouse=True)
def third_parties() -> Iterator[None]:
    third_party.register()
    yield
    third_party.forget()


@pytest.mark.parametrize(
    "is_async",
    [
        pytest.param(False, marks=pytest.mark.more_on_v2("with a step in flight more can go wrong")),
        True,
    ],
    ids=["sync", "async"],
)
def test_no_request_harms_another(tiny_llama: Path, is_async: bool) -> None:
    check(*served(tiny_llama, NUM_REQUESTS, WHOLE + BOUNDED, async_scheduling=is_async), one_worker(tiny_llama))


@pytest.mark.more_on_v2("test_draft_model.py verifies drafts on V2")
def test_no_request_harms_another_behind_a_draft_model(tiny_llama: Path) -> None:
    """It is the model itself."""
    drafts = {"method": "draft_model", "model": str(tiny_llama), "num_speculative_tokens": 4}
    asked, seconds = served(tiny_llama, NUM_REQUESTS, WHOLE, speculative_config=drafts)
    check(asked, seconds, one_worker(tiny_llama), takes_more=True)


@pytest.mark.more("the same requests run behind a draft model")
def test_no_request_harms_another_behind_ngrams(tiny_llama: Path) -> None:
    """In a process of its own: see test_speculation.py."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        args = tiny_llama, NUM_REQUESTS, WHOLE, ALPHABET
        asked, seconds = process.submit(served, *args, speculative_config=NGRAM).result()
    check(asked, seconds, one_worker(tiny_llama), takes_more=True)


@pytest.mark.more("test_parallel.py has some of the requests that fail")
def test_no_request_harms_another_on_two_workers(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both import what a third party brings, and each has faults of its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(third_party.entry_point(tmp_path))
    with two_workers(tiny_llama, **LITTLE_MEMORY) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        start = perf_counter()
        asked = run_at_random(llm, llm.llm_engine.step, SEED, NUM_REQUESTS, WHOLE + BOUNDED)
        seconds = perf_counter() - start
        assert not scheduler._lives and scheduler.kv_cache_manager.block_pool.get_usage() == 0
        assert scheduler._manager.in_use == CacheInUse()
    check(asked, seconds, two_workers(tiny_llama, enable_prefix_caching=False))
