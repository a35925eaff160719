"""Allocators that look at the scores of several requests together, and let the host wait for the device once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import starmap
from typing import Generic, TypeVar

import numpy as np
import torch

from vllm_kvevict.budgets.base import BudgetAllocator
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.batch import ScoreBatch

_Made = TypeVar("_Made")
_Other = TypeVar("_Other")


class Tiles(Generic[_Made]):
    """What is made of the scores of some layers at a time, again each time that they are gone through.

    Where one tile has all layers, it is made once and kept.

    bounds: of the layers of each tile
    """

    def __init__(self, bounds: Sequence[tuple[int, int]], make: Callable[[int, int], _Made]) -> None:
        self.bounds = bounds
        self._make = cache(make) if len(bounds) == 1 else make

    def __iter__(self) -> Iterator[_Made]:
        return starmap(self._make, self.bounds)

    def map(self, make: Callable[[_Made], _Other]) -> Tiles[_Other]:
        """Return what ``make`` makes of each of these."""
        return Tiles(self.bounds, lambda first, end: make(self._make(first, end)))


@dataclass(frozen=True)
class WishBatch:
    """Several requests that are to be given budgets.

    read:          returns [num_reqs, end - first, num_kv_heads, max_kv_len] float32, the scores of layers ``first`` to
                   ``end``, protected tokens at +inf; NaN behind the tokens of a request, and nowhere else
    shape:         num_reqs, num_layers, num_kv_heads, max_kv_len
    device:        of the scores
    kv_lens:       [num_reqs] tokens of each
    num_tokens:    [num_reqs] tokens per (layer, head) that each keeps on average
    num_protected: [num_reqs] protected tokens of each
    measures:      [num_reqs, num_layers, num_measures] float64, what ``measure`` returned
    """

    read: Callable[[int, int], torch.Tensor]
    shape: tuple[int, int, int, int]
    device: torch.device
    kv_lens: Sequence[int]
    num_tokens: Sequence[int]
    num_protected: Sequence[int]
    measures: torch.Tensor

    @classmethod
    def of(
        cls,
        scores: torch.Tensor,
        kv_lens: Sequence[int],
        num_tokens: Sequence[int],
        num_protected: Sequence[int],
        measures: torch.Tensor,
    ) -> WishBatch:
        """Return the batch of these scores [num_reqs, num_layers, num_kv_heads, max_kv_len]."""
        num_reqs, num_layers, num_kv_heads, max_kv_len = scores.shape
        return cls(
            lambda first, end: scores[:, first:end],
            (num_reqs, num_layers, num_kv_heads, max_kv_len),
            scores.device,
            kv_lens,
            num_tokens,
            num_protected,
            measures,
        )

    @cached_property
    def scores(self) -> torch.Tensor:
        """[num_reqs, num_layers, num_kv_heads, max_kv_len], the scores of all layers: too many for long prompts."""
        return self.read(0, self.shape[1])

    def tiles(self, num_bytes: int) -> Tiles[torch.Tensor]:
        """Return the scores of as many layers at a time as fit into the scratch: [num_reqs, num_layers, ...] each.

        num_bytes: what is held at once by each score
        """
        num_reqs, num_layers, num_kv_heads, max_kv_len = self.shape
        bounds = scratch.tiles([num_bytes * num_reqs * num_kv_heads * max_kv_len] * num_layers)
        return Tiles(bounds, self.read)

    @property
    def is_ragged(self) -> bool:
        """Whether some requests have fewer tokens than the longest one."""
        return min(self.kv_lens) < self.shape[3]

    @cached_property
    def lens(self) -> torch.Tensor:
        """[num_reqs] int64 on the device, the tokens of each request."""
        return self.on_device(self.kv_lens)

    def on_device(self, numbers: Sequence[int]) -> torch.Tensor:
        """Return [num_reqs] int64 on the device of the scores."""
        return to_device(np.array(numbers, dtype=np.int64), self.device)

    def facts(self, req: int) -> WishFacts:
        """Return what the host knows of a request."""
        _, num_layers, num_kv_heads, _ = self.shape
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

    def measure_batch(self, batch: ScoreBatch) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_measures] float64, what ``measure`` would of each layer of each request.

        An allocator that has it is asked for all requests together, the others layer by layer and request by request.
        """
        raise NotImplementedError

    @abstractmethod
    def share(self, summary: torch.Tensor, facts: WishFacts) -> torch.Tensor:
        """Return [num_layers, num_kv_heads] float64 on the CPU, as ``wish``.

        summary: [num_numbers] float64 on the CPU, the request's part of what ``summarise`` returned
        """

    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        num_protected = int(torch.isposinf(scores[0, 0]).sum())
        batch = WishBatch.of(scores[None], [scores.shape[2]], [num_tokens], [num_protected], measures[None])
        summary = self.summarise(batch)
        return self.share(torch.empty(0) if summary is None else summary[0].cpu(), batch.facts(0))


@cache
def wishes_for_batches(allocator: type) -> bool:
    """Whether an allocator is asked for several requests together: a subclass that changes ``wish`` is not."""
    return issubclass(allocator, BatchAllocator) and allocator.wish is BatchAllocator.wish


@cache
def measures_batches(allocator: type) -> bool:
    """Whether an allocator measures several requests together: a subclass that changes ``measure`` does not."""
    for cls in allocator.__mro__:
        if {"measure", "measure_batch"} & vars(cls).keys():
            return "measure_batch" in vars(cls) and cls is not BatchAllocator
    return False


def joint_summary(counts: Iterable[tuple[torch.Tensor, torch.Tensor]], num_reqs: int) -> torch.Tensor:
    """Return [num_reqs, 2 * counts of a request] float64, what ``count_best`` has counted, for ``joint_shares``.

    counts: of some layers each
    """
    parts = [part.view(num_reqs, -1) for parts in zip(*counts, strict=True) for part in parts]
    return torch.cat(parts, dim=1).to(torch.float64)


def joint_shares(summary: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """Return [num_groups, num_rows] float64, how many of its group's highest scores every row has.

    Rows that tie at the threshold share what is left in proportion to their ties, so that no order of rows matters.

    summary: [2 * num_groups * num_rows] of one request
    totals:  [num_groups] int64, how many scores of a group were asked for
    """
    above, ties = summary.view(2, len(totals), -1).unbind(0)
    missing = totals - above.sum(dim=1)
    return above + ties * (missing / ties.sum(dim=1).clamp(min=1))[:, None]
