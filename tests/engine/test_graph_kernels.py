"""Decode steps as CUDA graphs of FlashAttention, and steps that verify drafts; for the kernels functions stand in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.conftest import USES_V2_RUNNER
from tests.engine.graph_engines import Join, check_replays, flash_engine, serve, triton_engine
from tests.engine.test_speculation import counted_drafts

pytestmark = pytest.mark.skipif(not USES_V2_RUNNER, reason="full graphs are those of model runner V2")

NUM_DRAFTS = 2
JOINS = [
    Join(0, 20, 150, {"kv_eviction": "none"}),
    Join(4, 100, 70, {"kv_budget_allocator": "lava"}),
    Join(8, 70, 60, {"kv_eviction": "streaming_llm"}),
    Join(26, 110, 40, {"kv_budget_allocator": "pyramid"}),
    Join(27, 45, 12),
]


@pytest.fixture(scope="module")
def other_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that says often, and not always, what the tiny Llama says."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * model.lm_head.weight.std() * 0.3)
    folder = tmp_path_factory.mktemp("other_llama")
    model.save_pretrained(folder)
    return folder


def test_steps_that_verify_drafts(tiny_llama: Path, other_llama: Path) -> None:
    drafts = {"method": "draft_model", "model": str(other_llama), "num_speculative_tokens": NUM_DRAFTS}
    start = partial(flash_engine, tiny_llama, version=3, policy="snapkv", budget=64, speculative_config=drafts)
    with start(sizes=[]) as running:
        counts = counted_drafts(running)
        served_eagerly = serve(running, JOINS)
    drafted, accepted = map(sum, zip(*counts, strict=True))
    print(drafted, accepted)
    with start(sizes=[3, 12]) as running:
        replays = check_replays(running, JOINS, served_eagerly)
    print(replays.rows)
