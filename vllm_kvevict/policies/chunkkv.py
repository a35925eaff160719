"""ChunkKV: keep or evict whole chunks of neighbours, by the scores of another policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F

from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.policies.base import POLICIES
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.options import at_least
from vllm_kvevict.policies.stretches import tile_size
from vllm_kvevict.policies.wrapper import WrapperPolicy


@POLICIES.register("chunkkv")
@dataclass(frozen=True)
class ChunkKV(WrapperPolicy):
    """Score a chunk by what another policy thinks of its tokens, summed over the KV heads of a layer.

    Paper: Liu et al. 2025 (ChunkKV), arXiv:2502.00299. The heads of a layer share one ranking of whole chunks, and keep
    the same tokens with the allocator ``uniform``. Chunks are counted from the start of the prompt; a last short one
    competes with the mean of its own tokens. A prompt shorter than one chunk gets the other policy's scores unchanged,
    as in kvpress.

    Departs from the paper: no layer takes over the chunks of the one before it (the paper's index reuse). And a budget
    is kept to the token, so that one chunk at the cut may stay in part: its first tokens. For this, scores fall inside
    a chunk by one unit in the last place of float32 from token to token, and where the scores of chunks are closer than
    that, they are moved apart; no two chunks change places, and of equal ones the first ranks higher. With
    ``chunk_length`` the block size and no protected tokens, every block but one stays whole or goes whole.

    policy, policy_options: see ``WrapperPolicy``; the policy also says which tokens are protected
    chunk_length:           tokens of a chunk, >= 1

    Raises ValueError for another value, and for options that the policy does not take.
    """

    chunk_length: Annotated[int, at_least(1)] = 20
    name: ClassVar[str] = "chunkkv"
    paper: ClassVar[str] = "ChunkKV, arXiv:2502.00299"

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        # either the other policy's own, or its scores and ours; and of each chunk its sums, and what all KV heads share
        of_chunk = math.ceil((8 * num_kv_heads + 72) / self.chunk_length)
        return max(self.wrapped.scratch_bytes(num_heads, num_kv_heads, head_size), 8 * num_kv_heads + of_chunk)

    def rescore(self, batch: ScoreBatch, scores: torch.Tensor) -> torch.Tensor:
        length, of_wrapped = self.chunk_length, scores.flatten(0, 2)
        first = _descending(*self._chunk_means(batch, of_wrapped))
        first = first.expand(*batch.shape[:3], -1).flatten(0, 2)
        chunked, is_short = batch.new_scores(), batch.kv_lens.flatten()[:, None] < length
        place = torch.arange(length, dtype=torch.int32, device=first.device)
        for heads, start, end in batch.tiles(24, tile_size(length)):
            bits = (first[heads, start // length : cdiv(end, length), None] - place).flatten(1)[:, : end - start]
            of_chunks = _ordered_bits(bits).view(torch.float32)
            chunked[heads, start:end] = torch.where(is_short[heads], of_wrapped[heads, start:end], of_chunks)
        return chunked.view(batch.shape)

    def _chunk_means(self, batch: ScoreBatch, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the means of all chunks, summed over the heads that hold as many tokens; and the sizes of the chunks.

        scores:  [num_reqs * num_layers * num_kv_heads, max_kv_len]
        returns: [num_reqs, num_layers, num_kv_heads, num_chunks] float32 and int64, of one head if all are alike; a
                 chunk behind the tokens of its head has -inf and 0
        """
        length = self.chunk_length
        sums = scores.new_empty(len(scores), cdiv(batch.max_kv_len, length))
        for heads, start, end in batch.tiles(24, tile_size(length)):
            tile = scores[heads, start:end].masked_fill(batch.is_behind(heads, start, end), 0.0)
            chunks = F.pad(tile, (0, (start - end) % length)).unflatten(1, (-1, length))
            sums[heads, start // length : cdiv(end, length)] = chunks.sum(dim=2)
        summed = batch.sum_over_peers(sums.view(*batch.shape[:3], -1))
        starts = torch.arange(0, batch.max_kv_len, length, device=sums.device)
        sizes = (batch.kv_lens[:, :, : summed.shape[2], None] - starts).clamp_(0, length)
        return (summed / sizes).masked_fill_(sizes == 0, float("-inf")), sizes


def _descending(chunk_scores: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return [*, num_chunks] int32, of each chunk what its first token gets, as ``_ordered_bits``; the next ones each 1
    less. No two tokens are equal.

    In the order of scores, positions breaking ties, every token gets the score of its chunk or, if that is not below
    the token before it, the next smaller number. With u_k the scores as integers that are ordered alike, this is
    min over j <= k of (u_j + j) - k; inside a chunk the minimum does not change.

    chunk_scores: [*, num_chunks] float32, finite; -inf where there is no chunk
    sizes:        [*, num_chunks] int64, tokens of each
    """
    order = chunk_scores.argsort(dim=-1, descending=True, stable=True)
    sizes = sizes.gather(-1, order)
    tokens_before = sizes.cumsum(-1) - sizes
    ordered = _ordered_bits(chunk_scores.gather(-1, order).view(torch.int32)) + tokens_before
    best = ordered.cummin(-1).values - tokens_before
    return torch.empty_like(best).scatter_(-1, order, best).to(torch.int32)


def _ordered_bits(bits: torch.Tensor) -> torch.Tensor:
    """Map the bits of float32 numbers to int32 that are ordered like the numbers, and back: it is its own inverse."""
    return torch.where(bits < 0, torch.iinfo(torch.int32).min - bits, bits)
