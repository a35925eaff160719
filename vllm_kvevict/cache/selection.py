"""Which tokens stay: the best by score, the protected ones always."""

from __future__ import annotations

import torch


def protect(scores: torch.Tensor, num_sink: int, num_recent: int) -> torch.Tensor:
    """Return ``scores`` with the first ``num_sink`` and the last ``num_recent`` tokens at +inf.

    scores: [num_layers, num_kv_heads, kv_len] float32; NaN ranks last
    """
    protected = torch.nan_to_num(scores, nan=float("-inf"))
    protected[..., :num_sink] = float("inf")
    protected[..., max(scores.shape[-1] - num_recent, 0) :] = float("inf")
    return protected


def select(scores: torch.Tensor, num_kept: torch.Tensor) -> torch.Tensor:
    """Return [num_layers, num_kv_heads, kv_len] bool: the ``num_kept`` highest of every (layer, head).

    scores:   [num_layers, num_kv_heads, kv_len] float32
    num_kept: [num_layers, num_kv_heads] int64, at most kv_len

    Raises ValueError if a head should keep more tokens than there are.
    """
    most = int(num_kept.max())
    if most > scores.shape[-1]:
        raise ValueError(f"num_kept: expected at most {scores.shape[-1]} tokens, got {most}")
    order = scores.topk(most, dim=-1).indices
    within = torch.arange(most, device=scores.device) < num_kept.to(scores.device)[..., None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, within)
