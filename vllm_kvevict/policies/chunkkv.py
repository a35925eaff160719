"""ChunkKV: keep or evict whole chunks of neighbours, by the scores of another policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.policies.base import POLICIES, ScoreInputs
from vllm_kvevict.policies.options import at_least
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
        # either the other policy's own, or its scores and their sum, or what all KV heads share: three rows and a bit
        # of the tokens, and five int64 rows of the chunks
        shared = 13 + math.ceil(40 / self.chunk_length)
        return max(self.wrapped.scratch_bytes(num_heads, num_kv_heads, head_size), 4 * num_kv_heads + 4, shared)

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        if inputs.kv_len < self.chunk_length:
            return self.wrapped.score(inputs)
        means = _chunk_means(self.wrapped.score(inputs), self.chunk_length)
        return _descending(means, self.chunk_length, inputs.kv_len).expand(inputs.num_kv_heads, -1)


def _chunk_means(scores: torch.Tensor, length: int) -> torch.Tensor:
    """Return [num_chunks] float32, the mean of each chunk of ``scores`` [num_kv_heads, kv_len] summed over heads."""
    summed = scores.sum(dim=0)
    num_whole = len(summed) // length * length
    whole, rest = summed[:num_whole], summed[num_whole:]
    means = whole.unflatten(0, (-1, length)).mean(dim=1)
    return torch.cat([means, rest.mean(dim=0, keepdim=True)]) if len(rest) else means


def _descending(chunk_scores: torch.Tensor, length: int, num_tokens: int) -> torch.Tensor:
    """Return [num_tokens] float32, the score of each token's chunk, no two of them equal.

    In the order of scores, positions breaking ties, every token gets the score of its chunk or, if that is not below
    the token before it, the next smaller number. With u_k the scores as integers that are ordered alike, this is
    min over j <= k of (u_j + j) - k; inside a chunk the minimum does not change.

    chunk_scores: [num_chunks] float32, finite
    """
    order = chunk_scores.argsort(descending=True, stable=True)
    sizes = torch.full_like(order, length)
    sizes[-1] = num_tokens - (len(order) - 1) * length
    tokens_before = sizes[order].cumsum(0) - sizes[order]
    best = (_ordered_bits(chunk_scores[order].view(torch.int32)) + tokens_before).cummin(0).values - tokens_before
    first = torch.empty_like(best).scatter_(0, order, best).to(torch.int32)  # of each chunk, its first token
    place = torch.arange(length, dtype=torch.int32, device=first.device)
    return _ordered_bits((first[:, None] - place).flatten()[:num_tokens]).view(torch.float32)


def _ordered_bits(bits: torch.Tensor) -> torch.Tensor:
    """Map the bits of float32 numbers to int32 that are ordered like the numbers, and back: it is its own inverse."""
    return torch.where(bits < 0, torch.iinfo(torch.int32).min - bits, bits)
