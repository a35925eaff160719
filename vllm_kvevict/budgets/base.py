"""What an allocator states, and the one place that turns wishes into whole pages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from vllm_kvevict.policies.inputs import ScoreInputs
from vllm_kvevict.policies.options import check_options
from vllm_kvevict.registry import Registry


class BudgetAllocator(ABC):
    """Says how a request's pages are shared among layers and KV heads.

    Subclasses are frozen dataclasses: their fields are the options that a user may set, and the annotation of a field
    says which values it may have (``vllm_kvevict.policies.options``).

    name: the allocator's in messages about its options; one that has none is called by the name of its class
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Raise ValueError for an option that its annotation does not allow; subclasses may check more."""
        check_options(self)

    @property
    def query_window(self) -> int:
        """Last queries of the prompt that the engine must hold for ``measure``."""
        return 0

    def check_model(self, num_layers: int, num_kv_heads: int) -> None:  # noqa: B027  (most fit any model)
        """Raise ValueError, when the engine starts, if the options do not fit a model of this many layers and heads."""

    def measure(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return [num_measures] float64, what ``wish`` must know of one layer beside the policy's scores."""
        return torch.empty(0, dtype=torch.float64)

    @abstractmethod
    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        """Return [num_layers, num_kv_heads] float64, the tokens each head should keep; any scale and device, all >= 0.

        scores:     [num_layers, num_kv_heads, kv_len] float32, protected tokens at +inf
        num_tokens: tokens per (layer, head) that the request keeps on average
        measures:   [num_layers, num_measures] float64, what ``measure`` returned
        """


ALLOCATORS: Registry[BudgetAllocator] = Registry(
    "budget allocator",
    BudgetAllocator,  # type: ignore[type-abstract]
    "vllm_kvevict.allocators",
)


def round_to_pages(wish: torch.Tensor, total: int, minimum: int, maximum: int) -> torch.Tensor:
    """Return [num_layers, num_kv_heads] int64 whole pages in proportion to ``wish`` that sum to ``total``.

    What the limits cut off is shared again among the others in proportion to their wish; fractions go to the
    largest remainders, ties to the first.

    wish:             [num_layers, num_kv_heads] >= 0, any scale
    minimum, maximum: pages that every (layer, head) gets at least, at most

    Raises ValueError if no such allocation exists or a wish is negative or not finite.
    """
    count = wish.numel()
    if not minimum * count <= total <= maximum * count:
        raise ValueError(
            f"total: expected between {minimum * count} and {maximum * count} pages for {count} heads, got {total}"
        )
    flat = wish.detach().to("cpu", torch.float64).flatten()
    if not torch.isfinite(flat).all() or (flat < 0).any():
        raise ValueError(f"wish: expected finite numbers of at least 0, got {wish.tolist()}")
    share = _clamped_shares(flat / max(flat.max().item(), 1e-308), total, minimum, maximum)
    pages = share.floor()
    remainder = (share - pages).round(decimals=9)  # equal wishes must tie in spite of rounding
    missing = int(total - pages.sum().item())
    # a head at its maximum has no remainder, so it is never rounded up past it
    order = torch.argsort(remainder, descending=True, stable=True)
    pages[order[:missing]] += 1
    return pages.to(torch.int64).reshape(wish.shape)


def _clamped_shares(wish: torch.Tensor, total: int, minimum: int, maximum: int) -> torch.Tensor:
    """Scale ``wish`` (0 to 1) so that its values, clamped to the limits, sum to ``total``.

    The sum grows with the scale, in a straight line between scales at which a head reaches a limit. So the answer lies
    between two of these, and does not depend on the order of the heads.
    """
    if wish.sum() == 0 or wish.min() == wish.max():
        return torch.full_like(wish, total / wish.numel())
    # a head that wishes for nothing may still have to take pages when all others are full
    weights = wish.clamp(min=1e-12)
    scales = torch.cat([weights.new_zeros(1), minimum / weights, maximum / weights]).unique()
    sums = (weights * scales[:, None]).clamp(minimum, maximum).sum(dim=1)
    after = int((sums < total).sum().clamp(max=len(sums) - 1))
    before = max(after - 1, 0)
    rise = sums[after] - sums[before]
    part = (total - sums[before]) / rise if rise > 0 else 0.0
    scale = torch.lerp(scales[before], scales[after], part)
    return (weights * scale).clamp(minimum, maximum)
