"""CurDKV: keep the tokens whose keys and values matter most to the span of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F

from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.policies.base import POLICIES
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy
from vllm_kvevict.policies.options import at_least
from vllm_kvevict.policies.stretches import in_stretches, products, sum_of_tokens, tile_size

Gather = Callable[[slice, int, int], torch.Tensor]  # such as ScoreBatch.gather_keys

SMALLEST = torch.finfo(torch.float32).tiny
RANK_TOLERANCE = 1e-10  # of the largest eigenvalue of a Gram matrix: smaller ones are rounding, not rank


@POLICIES.register("curdkv")
@dataclass(frozen=True)
class CurDKV(BatchPolicy):
    """Score a token by what its key and its value contribute to a CUR decomposition of the attention output.

    Paper: Sengupta et al. 2025 (CurDKV), arXiv:2509.15038. The defaults are the code that the authors released, and
    kvpress's: squared norms as shares of their neighbourhood, key times value.
    ``CurDKV(measure="leverage", projection_rank=20, local_window=0)`` is what the paper derives: leverage scores of
    K and V through a Gaussian projection.

    Departs from both: the sinks stay because selection protects them, not because of their scores (the server's own
    ``num_sink`` goes before this one), and the projection is the same in every call. Departs from the released code, as
    kvpress does: neighbourhoods are counted from the start of the prompt, so that the last one may be short and its
    tokens get larger shares. Keys are post-RoPE, as there; the most recent tokens are not protected, as there.

    measure:         of one token's key or value, before shares: "norm", its squared length; "leverage", its leverage
                     score, the diagonal of X (X^T X)^+ X^T, with X the keys (values) of one head, not centred
    combine:         of the two shares: "product", "mean", or only that of the "key" or of the "value"
    local_window:    tokens of a neighbourhood, inside which shares sum to 1, >= 0; 0: shares are not taken
    projection_rank: columns of the Gaussian matrix that keys and values are multiplied by first, >= 0; 0: none
    seed:            of the Gaussian matrix, at least 0
    num_sink:        tokens at the start that always stay, >= 0

    Raises ValueError for another value.
    """

    measure: Literal["norm", "leverage"] = "norm"
    combine: Literal["product", "mean", "key", "value"] = "product"
    local_window: Annotated[int, at_least(0)] = 16
    projection_rank: Annotated[int, at_least(0)] = 0
    seed: Annotated[int, at_least(0)] = 0
    num_sink: Annotated[int, at_least(0)] = 4
    name: ClassVar[str] = "curdkv"
    paper: ClassVar[str] = "CurDKV, arXiv:2509.15038"
    old_names: ClassVar[Mapping[str, str]] = {"n_sink": "num_sink"}

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        """As the base class has it, but "leverage" lets the host wait: a GPU inverts its matrices so."""
        gathers = {"key": batch.gather_keys, "value": batch.gather_values}
        named = [self.combine] if self.combine in gathers else list(gathers)
        join = torch.mul if self.combine == "product" else torch.add  # a half would not outlive the last line
        size, scores = tile_size(self.local_window or 1), batch.new_scores()
        for heads in batch.head_tiles(self._bytes_per_token(batch.keys.shape[2]), size):
            shares = [self._shares(batch, gathers[name], heads) for name in named]
            total = torch.zeros((), device=scores.device)
            for start, end in batch.token_tiles(size):
                joined = reduce(join, [share(start, end) for share in shares])
                scores[heads, start:end] = joined
                total = total + sum_of_tokens(joined)
            scores[heads].div_(total[:, None].clamp_min(SMALLEST))
        return scores.view(batch.shape)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads  # the scores; all else is a tile

    def _bytes_per_token(self, head_size: int) -> int:
        """Return what a tile holds at once by each token of a head."""
        if self.measure == "norm":
            return 8 * head_size
        rank = self.projection_rank or head_size
        return 8 * head_size + 40 * rank + rank**2 // 4  # float64, and a matrix for each stretch

    def _shares(self, batch: ScoreBatch, gather: Gather, heads: slice) -> Callable[[int, int], torch.Tensor]:
        """Return a function of some tokens, ``start`` to ``end``, which cut no neighbourhood.

        It returns [num_heads, end - start] float32, the measures of keys or values as shares of a neighbourhood, 0
        behind the tokens of a head.
        """
        projection = self._projection(batch.keys)
        metric = _inverse_gram(batch, gather, heads, projection) if self.measure == "leverage" else None

        def shares(start: int, end: int) -> torch.Tensor:
            measure = _measure(gather(heads, start, end), projection, metric)
            return _share(measure.masked_fill_(batch.is_behind(heads, start, end), 0.0), self.local_window)

        return shares

    def _projection(self, keys: torch.Tensor) -> torch.Tensor | None:
        """Return [1, head_size, projection_rank] float32, entries from N(0, 1 / projection_rank), or None.

        Drawn on the CPU, so that every machine draws the same.
        """
        if self.projection_rank == 0:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.randn(1, keys.shape[2], self.projection_rank, generator=generator, device="cpu")
        return to_device(draws.numpy(), keys.device) / math.sqrt(self.projection_rank)


def _inverse_gram(batch: ScoreBatch, gather: Gather, heads: slice, projection: torch.Tensor | None) -> torch.Tensor:
    """Return [num_heads, rank, rank] float64, the pseudo-inverse of X^T X over all tokens of each of these heads."""
    gram = torch.zeros((), dtype=torch.float64, device=batch.keys.device)
    for start, end in batch.token_tiles():
        rows = _project(gather(heads, start, end), projection).double()
        stretches = in_stretches(rows.masked_fill_(batch.is_behind(heads, start, end)[..., None], 0.0))
        gram = gram + (stretches.transpose(2, 3) @ stretches).cumsum(dim=1)[:, -1]
    inverse: torch.Tensor = torch.linalg.pinv(gram, rtol=RANK_TOLERANCE, hermitian=True)
    return inverse


def _measure(x: torch.Tensor, projection: torch.Tensor | None, metric: torch.Tensor | None) -> torch.Tensor:
    """Return [num_heads, num_tokens] float32: squared lengths of the rows of ``x``, in the metric if there is one.

    x: [num_heads, num_tokens, head_size]
    """
    rows = _project(x, projection)
    if metric is None:
        return rows.square().sum(dim=-1)
    rows = rows.double()
    return (products(rows, metric) * rows).sum(dim=-1).clamp(min=0).float()


def _project(x: torch.Tensor, projection: torch.Tensor | None) -> torch.Tensor:
    return x if projection is None else products(x, projection)


def _share(measure: torch.Tensor, window: int) -> torch.Tensor:
    """Return ``measure`` [num_heads, num_tokens] over its sum in each stretch of ``window`` tokens."""
    if window == 0:
        return measure
    num_tokens = measure.shape[1]
    blocks: torch.Tensor = F.pad(measure, (0, -num_tokens % window)).unflatten(1, (-1, window))
    return (blocks / blocks.sum(dim=-1, keepdim=True).clamp_min(SMALLEST)).flatten(1)[:, :num_tokens]
