"""An engine in the benchmark's process, with or without eviction, and its scheduler and worker in reach."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from vllm import LLM

from tools.server import cpu_environment
from vllm_kvevict import kv_eviction_args

BLOCK_SIZE = 32
MAX_NUM_SEQS = 64  # requests at once that may evict during decode
MODEL = Path(__file__).parents[2] / ".cache" / "models" / "SmolLM2-135M-Instruct"


@contextmanager
def engine(
    model: Path, budget: int | None, policy: str = "snapkv", fields: dict[str, Any] | None = None, **kwargs: Any
) -> Iterator[LLM]:
    """Start an engine that evicts to ``budget`` tokens, or stock vLLM if ``budget`` is None; end it afterwards.

    fields: further fields of the ``EvictionConfig``
    """
    # the engine's memory is given by the caller, in blocks
    environment = {key: value for key, value in cpu_environment().items() if key != "VLLM_CPU_KVCACHE_SPACE"}
    for key, value in environment.items():
        os.environ.setdefault(key, value)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    fields = {"max_num_seqs": MAX_NUM_SEQS, **(fields or {})}
    eviction = {} if budget is None else kv_eviction_args(policy, budget, **fields)
    settings = {"block_size": BLOCK_SIZE, "enforce_eager": True, "max_model_len": 8192, "seed": 0}
    llm = LLM(str(model), skip_tokenizer_init=True, **{**settings, **eviction, **kwargs})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def core(llm: LLM) -> Any:
    """Return the engine core behind an LLM that runs in this process."""
    return llm.llm_engine.engine_core.engine_core


def random_prompt(length: int, seed: int) -> list[int]:
    """Return ``length`` token ids that no prefix cache has seen."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 40_000, (length,), generator=generator).tolist()
