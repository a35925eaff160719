"""Allocators that look at the scores of several requests together, and let the host wait for the device once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from vllm_kvevict.budgets.base import BudgetAllocator
from vllm_kvevict.cache.staging import to_device


@dataclass(frozen=True)
class WishBatch:
    """Several requests that are to be given budgets.

    scores:        [num_reqs, num_layers, num_kv_heads, max_kv_len] float32, protected tokens at +inf; NaN behind the
                   tokens of a request, and nowhere else
    kv_lens:       [num_reqs] tokens of each
    num_tokens:    [num_reqs] tokens per (layer, head) that each keeps on average
    num_protected: [num_reqs] protected tokens of each
    measures:      [num_reqs, num_layers, num_measures] float64, what ``measure`` returned
    """

    scores: torch.Tensor
    kv_lens: Sequence[int]
    num_tokens: Sequence[int]
    num_protected: Sequence[int]
    measures: torch.Tensor

    @property
    def is_ragged(self) -> bool:
        """Whether some requests have fewer tokens than the longest one."""
        return min(self.kv_lens) < self.scores.shape[3]

    @cached_property
    def lens(self) -> torch.Tensor:
        """[num_reqs] int64 on the device, the tokens of each request."""
        return self.on_device(self.kv_lens)

    def on_device(self, numbers: Sequence[int]) -> torch.Tensor:
        """Return [num_reqs] int64 on the device of the scores."""
        return to_device(np.array(numbers, dtype=np.int64), self.scores.device)

    def facts(self, req: int) -> WishFacts:
        """Return what the host knows of a request."""
        num_layers, num_kv_heads = self.scores.shape[1:3]
        numbers = self.kv_lens[req], self.num_tokens[req], self.num_protected[req]
        return WishFacts(num_layers, num_kv_heads, *numbers)


@dataclass(frozen=True)
class WishFacts:
    """What the host knows of a request. The numbers are those of ``WishBatch``."""

    num_layers: int
    num_kv_heads: int
    kv_len: int
    num_tokens: int
    num_protected: int


class BatchAllocator(BudgetAllocator):
    """Answers in two parts: one on the device, for all requests together, and one on the host, for each of them."""

    def summarise(self, batch: WishBatch) -> torch.Tensor | None:
        """Return [num_reqs, num_numbers] float64, all that ``share`` has to know of the scores; None: nothing.

        The number of launches does not depend on that of the requests, and nothing waits for the device.
        """
        return None

    @abstractmethod
    def share(self, summary: torch.Tensor, facts: WishFacts) -> torch.Tensor:
        """Return [num_layers, num_kv_heads] float64 on the CPU, as ``wish``.

        summary: [num_numbers] float64 on the CPU, the request's part of what ``summarise`` returned
        """

    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        num_protected = int(torch.isposinf(scores[0, 0]).sum())
        batch = WishBatch(scores[None], [scores.shape[2]], [num_tokens], [num_protected], measures[None])
        summary = self.summarise(batch)
        return self.share(torch.empty(0) if summary is None else summary[0].cpu(), batch.facts(0))


@cache
def wishes_for_batches(allocator: type) -> bool:
    """Whether an allocator is asked for several requests together: a subclass that changes ``wish`` is not."""
    return issubclass(allocator, BatchAllocator) and allocator.wish is BatchAllocator.wish


def joint_summary(above: torch.Tensor, ties: torch.Tensor, num_reqs: int) -> torch.Tensor:
    """Return [num_reqs, 2 * counts of a request] float64, what ``count_best`` has counted, for ``joint_shares``."""
    return torch.cat([counts.view(num_reqs, -1) for counts in (above, ties)], dim=1).to(torch.float64)


def joint_shares(summary: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """Return [num_groups, num_rows] float64, how many of its group's highest scores every row has.

    Rows that tie at the threshold share what is left in proportion to their ties, so that no order of rows matters.

    summary: [2 * num_groups * num_rows] of one request
    totals:  [num_groups] int64, how many scores of a group were asked for
    """
    above, ties = summary.view(2, len(totals), -1).unbind(0)
    missing = totals - above.sum(dim=1)
    return above + ties * (missing / ties.sum(dim=1).clamp(min=1))[:, None]
