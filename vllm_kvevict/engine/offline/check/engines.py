"""A stock engine and an evicting one answer the same prompts: what must be equal, and what must come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.offline.check.answers import Answer, difference, noise_of
from vllm_kvevict.engine.offline.check.dense import DenseModel
from vllm_kvevict.engine.offline.check.reachable import bridges_of, held_beside_cache
from vllm_kvevict.engine.offline.run import check_in_process, engine_args
from vllm_kvevict.eviction.record import recorded_evictions
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.policies import POLICIES

LENGTHS, NUM_ANSWERED, BUDGET, LOGPROBS = (40, 300, 700), 40, 128, 20
BY_BLOCK = {"kv_evict_during_decode": 1}
# schedule -> options of a request whose prompt is longer than the budget
SCHEDULES: dict[str, dict[str, Any]] = {
    "at the prompt's end": {},
    "between chunks of the prompt": {"kv_evict_during_prefill": 1, "kv_eviction": "tova"},
    "of the answer, block by block": BY_BLOCK,
    "of the answer, token by token": BY_BLOCK | {"kv_evict_interval": 1, "kv_eviction": "tova"},
}
AS_STOCK, AS_DENSE = "nothing evicted equals stock vLLM", "logits equal dense attention over the kept tokens"
COUNTED = "memory counted equals memory held"
FLAGS = ["--max-num-seqs", "4", "--max-num-batched-tokens", "256", "--no-enable-prefix-caching"]
# a question, which returns what was found; it raises AssertionError if that is wrong, and whatever else goes wrong
Question = Callable[[], str]


@dataclass
class Running:
    """An engine in this process, with its scheduler and its worker in reach."""

    llm: LLM

    def __post_init__(self) -> None:
        core: Any = self.llm.llm_engine.engine_core
        self.scheduler = core.engine_core.scheduler
        self.worker = core.engine_core.model_executor.driver_worker.worker
        self.vllm_config = self.llm.llm_engine.vllm_config
        self._num_asked = 0

    @property
    def num_free_blocks(self) -> int:
        count: int = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return count

    @property
    def _num_held(self) -> int:
        """Blocks of all requests, those beside them not counted that layers hold which are not evicted."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        tables = [each.req_to_blocks for each in managers if isinstance(each, FullAttentionManager)]
        return sum(not block.is_null for requests in tables for blocks in requests.values() for block in blocks)

    @property
    def is_float32(self) -> bool:
        return bool(self.vllm_config.model_config.dtype == torch.float32)

    def prompt(self, length: int) -> list[int]:
        """Return random tokens, the same of each engine of a model."""
        vocabulary = self.vllm_config.model_config.get_vocab_size()
        generator = torch.Generator().manual_seed(length)
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    def answer(self, prompt: list[int], **options: Any) -> tuple[Answer, list[int]]:
        """Return a greedy answer, and how many blocks its request held behind each step in layers that are evicted."""
        params = SamplingParams(
            temperature=0.0, max_tokens=NUM_ANSWERED, ignore_eos=True, logprobs=LOGPROBS, detokenize=False,
            extra_args=options or None,
        )  # fmt: skip
        self._num_asked += 1
        self.llm.llm_engine.add_request(f"check-{self._num_asked}", {"prompt_token_ids": prompt}, params)
        held, last = [], None
        while self.llm.llm_engine.has_unfinished_requests():
            last = next(iter(self.llm.llm_engine.step()), last)
            held.append(self._num_held)
        if last is None:
            raise AssertionError("the request ended without an answer")
        (output,) = last.outputs
        if output.finish_reason != "length":
            raise AssertionError(f"the request ended by {output.finish_reason!r} ({output.stop_reason})")
        steps = [{token: found.logprob for token, found in step.items()} for step in output.logprobs or []]
        return Answer(list(output.token_ids), steps), held


@contextmanager
def running(model: str, config: EvictionConfig | None, flags: list[str]) -> Iterator[Running]:
    """Start an engine, a stock one if there is no config, and end it behind the context."""
    llm = LLM.from_engine_args(engine_args(model, True, config, [*FLAGS, *flags]))
    try:
        check_in_process(llm)
        yield Running(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()


def evicting() -> EvictionConfig:
    """Return the configuration of the evicting engine: each request chooses its schedule."""
    return EvictionConfig.parse({"policy": "snapkv", "budget": BUDGET, "max_num_seqs": 4})


def lengths(engine: Running) -> list[int]:
    """Return lengths of prompts that the model can take."""
    most = engine.vllm_config.model_config.max_model_len - NUM_ANSWERED
    if most <= 2 * BUDGET:
        raise AssertionError(f"expected a model that takes prompts of more than {2 * BUDGET} tokens, got {most}")
    return [min(length, most) for length in LENGTHS]


def stock_answers(engine: Running) -> list[Answer]:
    """Return what stock vLLM says to each prompt."""
    return [engine.answer(engine.prompt(length))[0] for length in lengths(engine)]


def described(engine: Running) -> str:
    """Return who runs the model."""
    layers = engine.vllm_config.compilation_config.static_forward_context.values()
    backends = {layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")}
    runner = type(engine.worker.model_runner)
    mode = engine.vllm_config.compilation_config.cudagraph_mode
    return (
        f"{current_platform.device_name}, worker {type(engine.worker).__name__}, runner {runner.__module__}."
        f"{runner.__name__}, attention {' and '.join(sorted(backends))}, graphs {mode or 'none'}"
    )


def names_of_questions(is_tiny: bool) -> list[str]:
    """Return the names of the rows that an evicting engine answers."""
    return [AS_STOCK, *map("eviction {}".format, SCHEDULES), *[AS_DENSE] * is_tiny, COUNTED]


def questions(engine: Running, stock: list[Answer], tiny: Path | None) -> dict[str, Question | None]:
    """Return what to ask an evicting engine, by the names of the rows; None for what cannot be asked.

    stock: what stock vLLM says, nothing if it did not start
    tiny:   folder of the model if it is the tiny one, which can be compared with dense attention
    """
    asked: list[Question | None] = [(lambda: _as_stock(engine, stock)) if stock else None]
    asked += [partial(_gives_back, engine, options) for options in SCHEDULES.values()]
    if tiny is not None:
        asked.append(lambda: _as_dense(engine, tiny))
    asked.append(lambda: _counted(engine))
    return dict(zip(names_of_questions(tiny is not None), asked, strict=True))


def refused_policies(engine: Running) -> dict[str, str]:
    """Return the policies that ask for something which the model does not show, and why it does not."""
    missing = engine.worker.missing_needs()
    needs = {name: traits_of(POLICIES.get(name)()).needs for name in POLICIES.names_in("vllm_kvevict")}
    return {name: missing[need.name] for name, asked in needs.items() for need in asked if need.name in missing}


def _as_stock(engine: Running, stock: list[Answer]) -> str:
    worst = 0.0
    for length, expected in zip(lengths(engine), stock, strict=True):
        found, _ = engine.answer(engine.prompt(length), kv_budget=length + NUM_ANSWERED)
        worst = max(worst, difference(found, expected, engine.is_float32))
    return f"{len(stock)} answers of {NUM_ANSWERED} tokens; log-probabilities differ by {worst:.1e} at most"


def _gives_back(engine: Running, options: dict[str, Any]) -> str:
    block_size = engine.worker.eviction.pool.block_size
    free, length = engine.num_free_blocks, lengths(engine)[-1]
    _, held = engine.answer(engine.prompt(length), **options)
    kept, whole = cdiv(BUDGET, block_size) + 1, cdiv(length, block_size)
    # behind the last step the request has ended
    last = held[-2] - (0 if options else cdiv(NUM_ANSWERED, block_size))
    if not 0 < last <= kept + 1:
        raise AssertionError(f"expected at most {kept + 1} blocks of {block_size} tokens at the end, got {held[-2]}")
    if options.get("kv_evict_during_prefill") and max(held) >= whole:
        raise AssertionError(f"expected fewer than the {whole} blocks of the prompt at any time, got {max(held)}")
    if engine.num_free_blocks != free:
        raise AssertionError(f"expected {free} free blocks at the end, as at the start, got {engine.num_free_blocks}")
    return f"{length} tokens: {max(held)} blocks, then {held[-2]}; {free} are free again"


def _as_dense(engine: Running, folder: Path) -> str:
    prompt = engine.prompt(lengths(engine)[-1])
    with recorded_evictions() as records:
        answer, _ = engine.answer(prompt)
    logits = DenseModel(folder).logits([*prompt, *answer.tokens], records[0].kept)
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
    differences = [
        abs(found - float(expected[place, token]))
        for place, step in enumerate(answer.steps)
        for token, found in step.items()
    ]
    worst, most = max(differences), noise_of(engine.is_float32)
    if not worst <= most or math.isnan(sum(differences)):
        raise AssertionError(f"expected log-probabilities within {most} of dense attention's, got {worst:.3g}")
    return f"{len(differences)} log-probabilities differ by {worst:.1e} at most"


def _counted(engine: Running) -> str:
    counted = sum(sum(bridge.held.sizes().values()) for bridge in bridges_of(engine.worker))
    held = held_beside_cache(engine.worker)
    # what is known of the last batch is no more than some numbers for each request
    if abs(held - counted) > 64 << 10:
        raise AssertionError(f"expected {counted:,} bytes beside the KV cache, as counted, got {held:,}")
    return f"{held / 2**20:.1f} MiB beside the KV cache"
