"""What operators do to a running engine leaves no stale page table: cache resets, calls to the workers, new weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt

PROMPTS = [random_prompt(length, seed=length) for length in (40, 333, 700)]


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    with engine(tiny_llama, budget=96, max_num_batched_tokens=256) as started:
        yield started


@pytest.mark.feature("prefix-cache reset")
@pytest.mark.parametrize("num_steps", [2, 20])
def test_a_reset_of_the_prefix_cache_starts_running_requests_again(running: Engine, num_steps: int) -> None:
    """In the middle of a prompt, and in the middle of the answers."""
    ids = [running.add(prompt, max_tokens=40) for prompt in PROMPTS]
    for _ in range(num_steps):
        running.step()
    assert running.llm.reset_prefix_cache(reset_running_requests=True)
    evictions = running.num_evictions
    outputs = running.run()
    assert running.num_evictions == evictions + 2
    assert [len(outputs[request_id].outputs[0].token_ids) for request_id in ids] == [40] * 3
    assert len(running.bridge.page_table) <= 2
    running.check_all_free()
    (again,) = running.generate([PROMPTS[2]])
    assert again.num_cached_tokens <= 640


@pytest.mark.feature("LLM.collective_rpc")
def test_calls_to_the_workers(running: Engine) -> None:
    assert running.llm.collective_rpc(lambda worker: worker.eviction.pool.num_layers) == [2]
    assert running.llm.apply_model(lambda model: type(model).__name__) == ["LlamaForCausalLM"]


@pytest.mark.more_on_v2("on V1 weights are updated in the same way")
@pytest.mark.feature("weight update")
def test_new_weights_are_the_ones_that_policies_see(
    tiny_llama: Path, tmp_path: Path, kept_masks: list[torch.Tensor]
) -> None:
    """criticalkv reads W_O, which is kept once it was read."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, ::2] *= 30
    model.save_pretrained(tmp_path)
    with engine(tiny_llama, "criticalkv", budget=96, enable_prefix_caching=False) as updated:
        updated.tokens([PROMPTS[2]])
        updated.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path)})
        updated.tokens([PROMPTS[2]])
    with engine(tmp_path, "criticalkv", budget=96, enable_prefix_caching=False) as fresh:
        fresh.tokens([PROMPTS[2]])
    before, after, expected = kept_masks
    assert after.equal(expected)
    assert not before.equal(expected)
