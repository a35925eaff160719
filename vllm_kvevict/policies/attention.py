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
    probabilities: likewise, the softmax
    """

    start: int
    end: int
    logits: torch.Tensor
    probabilities: torch.Tensor


def attention_tiles(
    inputs: ScoreInputs, query: torch.Tensor | None = None, num_keys: int | None = None
) -> Iterator[AttentionTile]:
    """Yield the attention of the last queries over the cache in tiles of 1,024 tokens, in order.

    Keys are visited twice, first for the sums of the softmax, unless one tile holds them all. Scratch memory: 8 bytes
    for each query, head and token of a tile, whatever the length of the prompt.

    query:    what to use in place of ``inputs.grouped_query``; any group
    num_keys: the softmax runs over the first tokens only, as many as this; None: over all that a query sees
    """
    if query is None:
        query = inputs.grouped_query
    tiles = list(inputs.tiles(end=num_keys))
    if len(tiles) == 1:
        logits = _logits(query, inputs, *tiles[0])
        yield AttentionTile(*tiles[0], logits, logits.softmax(-1))
        return
    log_sums = query.new_full(query.shape[:-1], float("-inf"))
    for start, end in tiles:
        log_sums = torch.logaddexp(log_sums, _logits(query, inputs, start, end).logsumexp(-1))
    for start, end in tiles:
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
