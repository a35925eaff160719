"""Models whose attention has sinks or soft-capped logits: attention over evicted rows, and scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.harness import engine
from tests.engine.test_hybrid_models import check_logits
from tests.tiny_llama import random_prompt
from tools.matrix.families import SETTINGS, family_named
from vllm_kvevict.eviction.record import recorded_evictions

NAMES = ("gpt-oss", "Gemma 2")
WINDOW = 16


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    family_named(request.param).build(folder)
    return folder


@pytest.mark.feature("attention sinks and soft-capped logits")
def test_logits_equal_masked_dense_forward(model: Path, kept_masks: list[torch.Tensor]) -> None:
    check_logits(model, kept_masks, "lava", 130, **SETTINGS)


def test_scores_are_those_of_the_attention_that_transformers_computes(model: Path) -> None:
    """The sums of the softmax have the sinks in them, and logits are capped: of the last queries, and of all."""
    prompt, scores = random_prompt(300, seed=1), {}
    fields = {"policy_options": {"window": WINDOW, "pool_kernel": 1}}
    with engine(model, "snapkv", 96, fields, max_num_batched_tokens=130, **SETTINGS) as running:
        for policy in ("snapkv", "h2o"):
            with recorded_evictions() as records:
                running.tokens([prompt], extra_args={"kv_eviction": policy})
            scores[policy] = records[0].scores
        num_kv_heads = running.bridge.pool.num_kv_heads
        running.check_all_free()
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        attentions = dense(torch.tensor([prompt]), use_cache=False, output_attentions=True).attentions
    kinds = dense.config.layer_types
    full = [paid[0] for paid, kind in zip(attentions, kinds, strict=True) if kind == "full_attention"]
    paid = torch.stack(full).unflatten(1, (num_kv_heads, -1)).mean(2)  # [num_layers, num_kv_heads, query, key]
    judged = slice(0, 300 - WINDOW)
    torch.testing.assert_close(
        scores["snapkv"][..., judged], paid[:, :, -WINDOW:].mean(2)[..., judged], rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(scores["h2o"], paid.sum(2), rtol=1e-3, atol=1e-5)


@pytest.mark.more_on_v2("on V1 the same requests are compared, and a whole engine beside it")
def test_rows_together_are_answered_as_alone(model: Path) -> None:
    """Evicted and whole rows, prompts and answers in one step, and rows of several tokens."""
    prompts = [random_prompt(length, seed=length) for length in (40, 200, 333)]
    with engine(model, "h2o", 96, max_num_batched_tokens=100, enable_prefix_caching=False, **SETTINGS) as running:
        running.poison_unowned_memory()
        together = running.tokens(prompts, max_tokens=20, extra_args={"kv_evict_during_decode": True})
        for prompt, tokens in zip(prompts, together, strict=True):
            assert running.tokens([prompt], max_tokens=20, extra_args={"kv_evict_during_decode": True}) == [tokens]
        running.check_all_free()
