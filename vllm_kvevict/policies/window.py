"""What SnapKV and its descendants share: attention from the last queries of the prompt."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from vllm_kvevict.kernels.window_batch import Reduction
from vllm_kvevict.policies.base import EvictionPolicy, ScoreInputs
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.options import ODD, at_least


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

    def pooled(self, scores: torch.Tensor, pool: str) -> torch.Tensor:
        """Return ``scores`` [num_kv_heads, num_tokens], each the maximum or the mean of its neighbourhood.

        pool: "max", or "avg", for which zero padding counts at the edges
        """
        pool1d = F.max_pool1d if pool == "max" else F.avg_pool1d
        return pool1d(scores, self.pool_kernel, stride=1, padding=self.pool_kernel // 2)


@dataclass(frozen=True)
class WindowPolicy(ObservationWindow):
    """Ranks tokens by what the last ``window`` queries of the prompt attend to.

    window, pool_kernel: see ``ObservationWindow``
    """

    @property
    @abstractmethod
    def reduction(self) -> Reduction:
        """How attention becomes scores of the tokens before the window."""

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return self.score_batch(ScoreInputs.together([inputs]))[0, 0]

    @property
    def layers_at_once(self) -> int:
        return 16

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        scores = batch.window_scores(self.reduction)
        return batch.fill_last(scores, scores.amax(dim=(2, 3), keepdim=True))

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 8 * num_kv_heads  # the scores, and what they were before they were pooled
