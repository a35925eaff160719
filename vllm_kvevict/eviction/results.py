"""What a policy or an allocator, maybe one of a third party, has returned is checked before anything relies on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def checked(source: str, result: object, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return ``result`` if it is a dense float32 tensor of this shape on this device; its values are not looked at.

    source: who returned it, for the message

    Raises TypeError if it is no tensor, ValueError if it is another one.
    """
    result = _tensor(source, result)
    is_fitting = result.shape == torch.Size(shape) and result.dtype == torch.float32 and result.device == device
    if not is_fitting or result.layout != torch.strided:
        raise ValueError(f"{source}: expected {list(shape)} float32 on {device}, got {_described(result)}")
    return result


def checked_tokens(
    source: str, result: object, num_kv_heads: int, num_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``result`` if it is dense [num_kv_heads, at least 1] int64 on this device, with the nearest tokens from 0
    to ``num_tokens`` - 1 in place of others; and [] bool, whether there were none of these: the host does not wait to
    see it.

    Raises TypeError if it is no tensor, ValueError if it is another one.
    """
    result = _some_tokens(source, result, [num_kv_heads], device)
    tokens = result.clamp(0, num_tokens - 1)
    return tokens, (tokens == result).all()


def checked_preselection(
    source: str, result: object, num_kv_heads: int, num_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``checked_tokens``, of several requests in one layer: [num_reqs, num_kv_heads, *] int64 of dense [num_reqs, 1,
    num_kv_heads, *], -1 behind the tokens of a request that has fewer; and [num_reqs] bool.

    num_tokens: [num_reqs] int64, of each request
    """
    found = _some_tokens(source, result, [len(num_tokens), 1, num_kv_heads], num_tokens.device)[:, 0]
    tokens = torch.minimum(found.clamp(min=0), num_tokens[:, None, None] - 1)
    is_none = found == -1
    is_behind = is_none[:, :1].expand(is_none.shape) & (torch.arange(found.shape[2], device=found.device) > 0)
    are_known = torch.where(is_behind, is_none, tokens == found).flatten(1).all(dim=1)
    return tokens.masked_fill(is_behind, -1), are_known


def checked_wish(source: str, result: object, shape: Sequence[int]) -> torch.Tensor:
    """Return an allocator's wish as float64 on the CPU: finite numbers of at least 0, some of them above it.

    Raises TypeError if it is no tensor, ValueError if it is another one.
    """
    result = _tensor(source, result)
    if result.shape != torch.Size(shape):
        raise ValueError(f"{source}: expected {list(shape)}, got {list(result.shape)}")
    wish = result.to("cpu", torch.float64)
    total = wish.sum()
    if not torch.isfinite(wish).all() or (wish < 0).any() or not 0 < total < float("inf"):
        raise ValueError(f"{source}: expected finite numbers of at least 0, not all of them 0, got {wish.tolist()}")
    return wish


def _some_tokens(source: str, result: object, sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return ``result`` if it is dense [*sizes, at least 1] int64 on this device."""
    result = _tensor(source, result)
    is_fitting = [*result.shape[:-1]] == [*sizes] and result.shape[-1] > 0 and result.dtype == torch.int64
    if not is_fitting or result.device != device or result.layout != torch.strided:
        expected = ", ".join(map(str, sizes))
        raise ValueError(f"{source}: expected [{expected}, at least 1] int64 on {device}, got {_described(result)}")
    return result


def _described(tensor: torch.Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f", {str(tensor.layout).removeprefix('torch.')}"
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}{layout}"


def _tensor(source: str, result: object) -> torch.Tensor:
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"{source}: expected a tensor, got {type(result).__name__}")
    return result
