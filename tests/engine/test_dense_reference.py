"""The engine over compacted pages equals a dense forward of the same weights with the evicted tokens masked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.dense import DenseModel
from tests.engine.harness import Engine, engine
from tests.tiny_llama import VOCAB_SIZE, random_prompt

NUM_STEPS = 64
KV_BYTES = 64 << 20


def run_with_logits(running: Engine, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Return the generated tokens and the logits [NUM_STEPS, vocab] they were sampled from."""
    (output,) = running.generate([prompt], max_tokens=NUM_STEPS, logprobs=-1)
    completion = output.outputs[0]
    rows = [[step[token].logprob for token in range(VOCAB_SIZE)] for step in completion.logprobs]
    return list(completion.token_ids), torch.tensor(rows)


@pytest.mark.parametrize(
    ("length", "budget", "block_size", "chunk"),
    [(500, 96, 32, 2048), (513, 128, 64, 2048), (352, 96, 32, 100), (385, 0.25, 32, 64)],
    ids=["one chunk", "block 64, one token in the last block", "full last block, chunks", "fraction, tiny chunks"],
)
def test_logits_equal_masked_dense_forward(
    tiny_llama: Path,
    kept_masks: list[torch.Tensor],
    length: int,
    budget: int | float,
    block_size: int,
    chunk: int,
) -> None:
    prompt = random_prompt(length, seed=length)
    with engine(
        tiny_llama,
        budget=budget,
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
    assert kept.sum(-1).unique().tolist() == [kept.sum(-1)[0, 0].item()]
    dense = DenseModel(tiny_llama)
    expected = dense.logits(prompt + tokens[:-1], kept)[length - 1 :]
    assert (logits - expected).abs().max() < 1e-3
    # the check can tell: without the mask the logits differ by far more
    whole = dense.logits(prompt + tokens[:-1])[length - 1 :]
    assert (logits[0] - whole[0]).abs().max() < 1e-3, "the first token must come from the full cache"
    assert (logits[1:] - whole[1:]).abs().max() > 0.1
