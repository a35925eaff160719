"""The engine over compacted pages equals a dense forward of the same weights with the evicted tokens masked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.prompts import chat_tokens, long_text
from tests.engine.harness import Engine, engine
from tests.tiny_llama import VOCAB_SIZE, random_prompt
from vllm_kvevict.engine.offline.check.dense import DenseModel

pytestmark = pytest.mark.on_v1

NUM_STEPS = 64
KV_BYTES = 64 << 20
MORE = pytest.mark.more("ragged layers are evicted from a full last block and in chunks, too")
ON_V1 = pytest.mark.more_on_v2("on V1 the same block sizes, chunks and shares are compared")


def run_with_logits(running: Engine, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Return the generated tokens and the logits [NUM_STEPS, vocab] they were sampled from."""
    (output,) = running.generate([prompt], max_tokens=NUM_STEPS, logprobs=-1)
    completion = output.outputs[0]
    rows = [[step[token].logprob for token in range(VOCAB_SIZE)] for step in completion.logprobs]
    return list(completion.token_ids), torch.tensor(rows)


@pytest.mark.parametrize(
    ("policy", "weights", "length", "budget", "block_size", "chunk"),
    [
        pytest.param("snapkv", None, 500, 96, 32, 2048, id="one chunk", marks=pytest.mark.smoke),
        pytest.param("snapkv", None, 513, 128, 64, 2048, id="block 64, one token in the last block", marks=ON_V1),
        pytest.param("snapkv", None, 352, 96, 32, 100, id="full last block, chunks", marks=MORE),
        pytest.param("snapkv", None, 385, 0.25, 32, 64, id="fraction, tiny chunks"),
        pytest.param("lava", [[1, 7], [3, 0.5]], 700, 224, 32, 2048, id="ragged heads", marks=pytest.mark.smoke),
        pytest.param("snapkv", [1, 6], 640, 224, 32, 150, id="ragged layers, full last block, chunks", marks=ON_V1),
        pytest.param("lava", [[0, 0], [0, 1]], 993, 256, 64, 2048, id="one head takes all, block 64", marks=ON_V1),
    ],
)
def test_logits_equal_masked_dense_forward(
    tiny_llama: Path,
    tmp_path: Path,
    kept_masks: list[torch.Tensor],
    policy: str,
    weights: list[Any] | None,
    length: int,
    budget: int | float,
    block_size: int,
    chunk: int,
) -> None:
    fields: dict[str, Any] = {"allocator": "uniform"}
    if weights is not None:
        (tmp_path / "weights.json").write_text(json.dumps(weights))
        fields = {"allocator": "fixed", "allocator_options": {"file": str(tmp_path / "weights.json")}}
    prompt = random_prompt(length, seed=length)
    with engine(
        tiny_llama,
        policy,
        budget=budget,
        fields=fields,
        block_size=block_size,
        max_num_batched_tokens=chunk,
        kv_cache_memory_bytes=KV_BYTES,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
    ) as running:
        running.poison_unowned_memory()
        tokens, logits = run_with_logits(running, prompt)
        running.check_all_free()
    (kept,) = kept_masks
    counts = kept.sum(-1)
    assert int(counts.max()) == int(counts.min()) if weights is None else int(counts.max()) > 2 * int(counts.min())
    dense = DenseModel(tiny_llama)
    expected = dense.logits(prompt + tokens[:-1], kept)[length - 1 :]
    assert (logits - expected).abs().max() < 1e-3
    # the check can tell: without the mask the logits differ by far more
    whole = dense.logits(prompt + tokens[:-1])[length - 1 :]
    assert (logits[0] - whole[0]).abs().max() < 1e-3, "the first token must come from the full cache"
    assert (logits[1:] - whole[1:]).abs().max() > 0.1


def dense_snapkv_scores(dense: DenseModel, length: int, window: int = 32, kernel: int = 7) -> torch.Tensor:
    """SnapKV's scores from dense queries and keys, from the paper: [num_layers, num_kv_heads, length - window]."""
    layers = []
    for query, keys in zip(dense.queries, dense.keys, strict=True):
        group = query.shape[1] // keys.shape[0]
        last = query[length - window : length].transpose(0, 1)
        logits = last @ keys[:, :length].repeat_interleave(group, 0).transpose(1, 2) / query.shape[2] ** 0.5
        hidden = torch.ones(window, length, dtype=torch.bool).triu(length - window + 1)
        attention = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        scores = attention.mean(1).unflatten(0, (-1, group)).mean(1)[:, : length - window]
        layers.append(torch.nn.functional.max_pool1d(scores, kernel, stride=1, padding=kernel // 2))
    return torch.stack(layers)


@pytest.mark.more("a real model: the logits are compared with those of a tiny one, its scores in test_fp8_cache.py")
def test_smollm2_keeps_what_snapkv_says_and_continues_like_the_masked_model(
    smollm2: Path, kept_masks: list[torch.Tensor]
) -> None:
    prompt = chat_tokens(smollm2, long_text(60))
    length = len(prompt)
    with engine(smollm2, budget=256, max_num_batched_tokens=300, kv_cache_memory_bytes=256 << 20) as running:
        (output,) = running.generate([prompt], max_tokens=NUM_STEPS, logprobs=1)
    tokens = list(output.outputs[0].token_ids)
    (kept,) = kept_masks
    dense = DenseModel(smollm2)
    dense.logits(prompt)
    scores = dense_snapkv_scores(dense, length)
    assert kept[..., -32:].all()
    # max-pooling makes plateaus, so the set is not unique; but no evicted token may score above a kept one
    inner = kept[..., :-32]
    lowest_kept = scores.masked_fill(~inner, float("inf")).amin(-1)
    highest_evicted = scores.masked_fill(inner, float("-inf")).amax(-1)
    # float32 rounding over 30 layers moves a score by less than 1e-3 of itself
    assert (highest_evicted <= lowest_kept * (1 + 1e-3) + 1e-7).all()
    logprobs = dense.logits(prompt + tokens[:-1], kept)[length - 1 :].log_softmax(-1)
    steps = zip(output.outputs[0].logprobs, tokens, strict=True)
    engine_logprobs = torch.tensor([step[token].logprob for step, token in steps])
    assert (engine_logprobs - logprobs[torch.arange(NUM_STEPS), tokens]).abs().max() < 1e-3
