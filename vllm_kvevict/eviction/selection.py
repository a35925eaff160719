"""Which tokens stay: the best by score, the protected ones always."""

from __future__ import annotations

import torch

from vllm_kvevict.kernels.select import select

__all__ = ["protect", "select"]


def protect(scores: torch.Tensor, num_sink: int, num_recent: int, kv_lens: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``scores`` with the first ``num_sink`` and the last ``num_recent`` tokens at +inf, as allocators see them.

    scores:  [*heads, kv_len] float32; NaN ranks last
    kv_lens: [*heads] int64, tokens of each head; behind them everything becomes NaN. None: ``kv_len``
    """
    protected = torch.nan_to_num(scores, nan=float("-inf"))
    protected[..., :num_sink] = float("inf")
    if kv_lens is None:
        protected[..., max(scores.shape[-1] - num_recent, 0) :] = float("inf")
        return protected
    place, end = torch.arange(scores.shape[-1], device=scores.device), kv_lens[..., None]
    protected.masked_fill_(place >= end - num_recent, float("inf"))
    return protected.masked_fill_(place >= end, float("nan"))
