"""What kernels over pages share: the codes of dtypes, and the checks of what they are given.

Every check raises ValueError unless its arguments are as it says. Only those of page ids and slots read a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# The numbers are those of `enum Dtype` in csrc/cpu/element.hpp.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.float8_e5m2: 4}
QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
ELEMENT_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # for copies in which no NaN payload may change
LOG2_E = 1.4426950408889634  # logits in units of log 2 make the exponential a power of two


def check_query(query: torch.Tensor, *sizes: str) -> None:
    """Queries [*sizes], last dimension contiguous."""
    if query.dim() != len(sizes) or 0 in query.shape or query.stride(-1) != 1 or query.dtype not in QUERY_DTYPES:
        raise ValueError(
            f"`query`: expected {' or '.join(map(str, QUERY_DTYPES))} [{', '.join(sizes)}] with a contiguous last "
            f"dimension, got {query.dtype} {tuple(query.shape)}, strides {query.stride()}."
        )


def check_keys(keys: torch.Tensor) -> None:
    """A pool of keys [num_pages, block_size, head_size], the token or the head_size dimension contiguous."""
    if keys.dim() != 3 or 0 in keys.shape or 1 not in keys.stride()[1:] or keys.dtype not in DTYPE_CODES:
        raise ValueError(
            "`keys`: expected floats [num_pages, block_size, head_size] with a contiguous token or head_size "
            f"dimension, got {keys.dtype} {tuple(keys.shape)}, strides {keys.stride()}."
        )


def check_keys_of(query: torch.Tensor, keys: torch.Tensor) -> None:
    """A pool of keys that ``query`` can be multiplied with."""
    check_keys(keys)
    head_size, device = query.shape[-1], query.device
    if keys.shape[2] != head_size or keys.dtype not in (query.dtype, *FLOAT8_DTYPES) or keys.device != device:
        raise ValueError(
            f"`keys`: expected {query.dtype}, or an 8-bit float, of head size {head_size} on {device}; "
            f"got {keys.dtype} of head size {keys.shape[2]} on {keys.device}."
        )


def check_page_table(page_table: torch.Tensor, device: torch.device, num_reqs: int | None = None) -> None:
    """[num_kv_heads, max_pages] int64, rows contiguous; with ``num_reqs``, as many of these."""
    leading = [] if num_reqs is None else [num_reqs]
    if page_table.dim() != len(leading) + 2 or [*page_table.shape[:-2]] != leading or 0 in page_table.shape:
        sizes = ", ".join(map(str, [*leading, "num_kv_heads", "max_pages"]))
        raise ValueError(f"`page_table`: expected [{sizes}], got shape {tuple(page_table.shape)}.")
    check_rows("page_table", page_table, device)


def check_groups(num_heads: int, num_kv_heads: int) -> None:
    """As many query heads for each KV head."""
    if num_heads % num_kv_heads != 0:
        raise ValueError(
            f"`page_table`: expected a number of KV heads that divides {num_heads} query heads, got {num_kv_heads}."
        )


def check_logits(softcap: float, sinks: torch.Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """A cap of at least 0, and the sinks of query heads, float32 without gaps, if there are any."""
    if not 0 <= softcap < math.inf:
        raise ValueError(f"`softcap`: expected a finite number, at least 0, got {softcap}.")
    if sinks is not None:
        check_contiguous("sinks", sinks, shape, torch.float32, device)


def capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """Return logits, soft-capped unless the cap is 0; in place."""
    return logits if softcap == 0 else logits.div_(softcap).tanh_().mul_(softcap)


def softmax_with_sinks(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Return the softmax over the last dimension, in whose sum a sink takes part that no key has.

    sinks: as ``logits`` but for the last dimension, or to be broadcast
    """
    if sinks is None:
        return logits.softmax(-1)
    with_sink = torch.cat([logits, sinks[..., None].expand(*logits.shape[:-1], 1)], dim=-1)
    return with_sink.softmax(-1)[..., :-1]


def check_page_ids(page_ids: torch.Tensor, num_pages: int) -> None:
    """Pages of a pool."""
    lowest, highest = page_ids.aminmax()
    if lowest < 0 or highest >= num_pages:
        raise ValueError(f"`page_table`: expected page ids 0 to {num_pages - 1}, got {int(lowest)} to {int(highest)}.")


def check_slots(name: str, slots: torch.Tensor, pages: torch.Tensor, least: int = 0) -> None:
    """Slots of a pool ``pages`` [num_pages, block_size, ...], on its device; numbers are looked at on CPU only."""
    if slots.dtype != torch.int64 or slots.device != pages.device:
        raise ValueError(f"`{name}`: expected int64 on {pages.device}, got {slots.dtype} on {slots.device}.")
    if slots.numel() > 0 and slots.device.type == "cpu":
        last = pages.shape[0] * pages.shape[1] - 1
        lowest, highest = slots.aminmax()
        if lowest < least or highest > last:
            raise ValueError(f"`{name}`: expected slots {least} to {last}, got {int(lowest)} to {int(highest)}.")


def check_rows(name: str, table: torch.Tensor, device: torch.device, dtype: torch.dtype = torch.int64) -> None:
    """That dtype in contiguous rows."""
    if table.dtype != dtype or table.device != device or table.stride(-1) != 1:
        raise ValueError(
            f"`{name}`: expected {str(dtype).removeprefix('torch.')} on {device} with contiguous rows, "
            f"got {table.dtype} on {table.device}, strides {table.stride()}."
        )


def check_contiguous(
    name: str, tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Exactly that shape, dtype and device, without gaps."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"`{name}`: expected contiguous {dtype} {list(shape)} on {device}, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}."
        )
