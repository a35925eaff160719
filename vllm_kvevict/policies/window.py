"""What SnapKV and its descendants share: attention from the last queries of the prompt."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from vllm_kvevict.kernels.window_batch import Reduction
from vllm_kvevict.policies.base import EvictionPolicy
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy
from vllm_kvevict.policies.options import ODD, at_least

_POOL_TILE = 2**11  # tokens


@dataclass(frozen=True)
class ObservationWindow(EvictionPolicy):
    """Judges the tokens before the last ``window`` ones by the queries of these, which are always kept.

    window:      observation window in tokens, >= 1
    pool_kernel: width in tokens of the pool by which neighbours share their score, odd, >= 1

    Raises ValueError for a value outside those ranges.
    """

    window: Annotated[int, at_least(1)] = 32
    pool_kernel: Annotated[int, ODD, at_least(1)] = 7

    @property
    def query_window(self) -> int:
        return self.window

    @property
    def num_recent(self) -> int:
        return self.window

    def pool_scores(self, scores: torch.Tensor, kv_lens: torch.Tensor, num_last: int, pool: str) -> None:
        """In place: ``pool_in_place`` with the width of this policy, of the judged tokens alone.

        scores:   [num_heads, num_tokens], anything where a token is not judged, before and after
        kv_lens:  [num_heads] int64, tokens of each head
        num_last: of these, the last ones, which are not judged
        """
        is_left_out = torch.arange(num_last, num_last + scores.shape[1], device=scores.device) >= kv_lens[:, None]
        scores.masked_fill_(is_left_out, _outside(pool))
        pool_in_place(scores, pool, self.pool_kernel)


def pool_in_place(scores: torch.Tensor, pool: str, width: int) -> None:
    """In place: exchange each of ``scores`` [num_rows, num_tokens] for the maximum or the mean of its neighbourhood.

    pool:  "max", or "avg", for which zero padding counts at the edges
    width: of a neighbourhood in tokens, odd
    """
    reach, num_tokens = width // 2, scores.shape[1]
    pool1d = F.max_pool1d if pool == "max" else F.avg_pool1d
    edge = scores.new_full((len(scores), reach), _outside(pool))
    before = edge
    for start in range(0, num_tokens, _POOL_TILE):
        end = min(start + _POOL_TILE, num_tokens)
        behind = scores[:, end : end + reach]
        around = torch.cat([before, scores[:, start:end], behind, edge[:, behind.shape[1] :]], dim=1)
        scores[:, start:end] = pool1d(around, width, stride=1)
        before = around[:, end - start : end - start + reach]  # as they were


def _outside(pool: str) -> float:
    """Return what stands where there is no token."""
    return float("-inf") if pool == "max" else 0.0


@dataclass(frozen=True)
class WindowPolicy(BatchPolicy, ObservationWindow):
    """Ranks tokens by what the last ``window`` queries of the prompt attend to.

    window, pool_kernel: see ``ObservationWindow``
    """

    @property
    @abstractmethod
    def reduction(self) -> Reduction:
        """How attention becomes scores of the tokens before the window."""

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        scores = batch.window_scores(self.reduction)
        return batch.fill_last(scores)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 8 * num_kv_heads  # the scores, and what they were before they were pooled
