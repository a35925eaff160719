"""Attention of a few queries over a paged cache, tile by tile, for scores that need more than its column sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from vllm_kvevict.kernels.paged import capped
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.stretches import STRETCH


@dataclass(frozen=True)
class AttentionTile:
    """What the queries of some heads pay to tokens ``start`` to ``end``. Queries stand last, so that what is reduced
    over them is the same for each token whatever the size of the tile.

    logits:        [num_heads, end - start, group, num_queries] float32, scaled and capped; -inf where a query does not
                   see the key
    probabilities: likewise, the softmax, of which sinks have a part; 0 where a query does not see the key
    """

    start: int
    end: int
    logits: torch.Tensor
    probabilities: torch.Tensor


def attention_bytes(batch: ScoreBatch) -> int:
    """Return the most bytes that ``attention_tiles`` holds at once for each token of a tile and each of its heads."""
    num_queries, num_heads, head_size = batch.query.shape[2:]
    group = num_heads // batch.kv_lens.shape[2]
    return 17 * group * num_queries + 6 * head_size  # logits and softmax of two tiles, and what is hidden; the keys


def attention_tiles(batch: ScoreBatch, heads: slice, last_seen: torch.Tensor | None = None) -> Iterator[AttentionTile]:
    """Yield the attention of the last queries of some heads in tiles of 1,024 tokens, in order.

    Keys are visited twice, first for the sums of the softmax, unless one tile holds them all. The sums go from stretch
    to stretch, so that what stands behind the tokens of a head does not change their order.

    heads:     of [num_reqs * num_layers * num_kv_heads]
    last_seen: [num_heads, num_queries] int64, the last cache index that a query sees; None: that of its own token
    """
    tiles, query = list(batch.token_tiles()), batch.grouped_query[heads]
    if last_seen is None:
        last_seen = batch.kv_lens.flatten()[heads, None] + torch.arange(-query.shape[2], 0, device=query.device)
    of_tile = partial(_logits, batch, query, last_seen, heads)
    first, *others = tiles
    logits = of_tile(*first)
    log_sums = log_sum(log_sums_of_stretches(logits))
    for tile in others:
        log_sums = log_sum(torch.cat([log_sums, log_sums_of_stretches(of_tile(*tile))], dim=1))
    if (sinks := batch.sinks_for(batch.query.shape[3])) is not None:
        log_sums = torch.logaddexp(log_sums, sinks[heads, None, :, None])
    log_sums = log_sums.clamp(min=torch.finfo(torch.float32).min)  # of queries that see nothing
    for tile in tiles:
        if others:
            logits = of_tile(*tile)
        yield AttentionTile(*tile, logits, (logits - log_sums).exp_())


def _logits(
    batch: ScoreBatch, query: torch.Tensor, last_seen: torch.Tensor, heads: slice, start: int, end: int
) -> torch.Tensor:
    """Return [num_heads, end - start, group, num_queries].

    query:     [num_heads, group, num_queries, head_size]
    last_seen: [num_heads, num_queries], the last cache index that a query sees
    """
    products = batch.gather_keys(heads, start, end) @ query.flatten(1, 2).transpose(1, 2)
    products = capped(products.mul_(batch.scale / batch.key_scale), batch.softcap)
    logits: torch.Tensor = products.unflatten(2, query.shape[1:3])
    is_hidden = torch.arange(start, end, device=query.device)[:, None] > last_seen[:, None]
    return logits.masked_fill_(is_hidden[:, :, None], float("-inf"))


def log_sums_of_stretches(logits: torch.Tensor) -> torch.Tensor:
    """Return [num_heads, num_stretches, group, num_queries]."""
    padded = F.pad(logits, (0, 0, 0, 0, 0, -logits.shape[1] % STRETCH), value=float("-inf"))
    stretches: torch.Tensor = padded.unflatten(1, (-1, STRETCH))
    return stretches.logsumexp(dim=2)


def log_sum(logs: torch.Tensor) -> torch.Tensor:
    """Return [num_heads, 1, group, num_queries] of many, one by one: -inf at their end changes nothing."""
    return logs.logcumsumexp(dim=1)[:, -1:]
