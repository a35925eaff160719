"""Attention of a few queries over a paged cache, tile by tile, for scores that need more than its column sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_kvevict.policies.base import ScoreInputs


@dataclass(frozen=True)
class AttentionTile:
    """What the queries pay to tokens ``start`` to ``end``.

    logits:        [num_kv_heads, group, num_queries, end - start] float32, scaled; -inf where causality hides the key
    probabilities: likewise, the softmax over all tokens of the cache
    """

    start: int
    end: int
    logits: torch.Tensor
    probabilities: torch.Tensor


def attention_tiles(inputs: ScoreInputs) -> Iterator[AttentionTile]:
    """Yield the attention of ``inputs.query`` over the whole cache in tiles of 1,024 tokens, in order.

    Keys are visited twice, first for the sums of the softmax. Scratch memory: 8 bytes for each query, head and token
    of a tile, whatever the length of the prompt.
    """
    query = (
        inputs.query.float().transpose(0, 1).unflatten(0, (inputs.num_kv_heads, -1))
    )  # [kv heads, group, queries, D]
    log_sums = query.new_full(query.shape[:-1], float("-inf"))
    for start, end in inputs.tiles():
        log_sums = torch.logaddexp(log_sums, _logits(query, inputs, start, end).logsumexp(-1))
    for start, end in inputs.tiles():
        logits = _logits(query, inputs, start, end)
        yield AttentionTile(start, end, logits, (logits - log_sums[..., None]).exp())


def _logits(query: torch.Tensor, inputs: ScoreInputs, start: int, end: int) -> torch.Tensor:
    logits = query @ inputs.gather_keys(start, end).transpose(1, 2)[:, None] * inputs.scale
    num_queries = query.shape[2]
    first_query = inputs.kv_len - num_queries
    if end > first_query:
        tokens = torch.arange(start, end, device=query.device)
        last_seen = torch.arange(first_query, inputs.kv_len, device=query.device)
        logits = logits.masked_fill(tokens > last_seen[:, None], float("-inf"))
    return logits
