"""Which tokens stay: the best by score, the protected ones always."""

from __future__ import annotations

import torch

from vllm_kvevict.kernels.select import select

__all__ = ["protect", "select"]


def protect(scores: torch.Tensor, num_sink: int, num_recent: int) -> torch.Tensor:
    """Return ``scores`` with the first ``num_sink`` and the last ``num_recent`` tokens at +inf, as allocators see them.

    scores: [num_layers, num_kv_heads, kv_len] float32; NaN ranks last
    """
    protected = torch.nan_to_num(scores, nan=float("-inf"))
    protected[..., :num_sink] = float("inf")
    protected[..., max(scores.shape[-1] - num_recent, 0) :] = float("inf")
    return protected
