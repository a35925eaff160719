"""Reads and moves tokens of tiled pages, in which one token's elements lie at no fixed distance from each other.

vLLM's attention for AMX keeps its pages so. Of token t of a page, dimension d of the key is element
``t // 16 * 16 * head_size + d // 2 * 32 + t % 16 * 2 + d % 2`` of the page's keys, and dimension d of the value is
element ``d // 16 * 16 * block_size + t // 2 * 32 + d % 16 * 2 + t % 2`` of its values.
"""

from __future__ import annotations

import torch

from vllm_kvevict.kernels.native import function
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.paged import ELEMENT_VIEWS, check_slots

TILE = 16


@operator(
    "(Tensor keys, Tensor values, Tensor slots) -> (Tensor, Tensor)",
    fake=lambda keys, values, slots: (
        keys.new_empty(*slots.shape, keys.shape[2]),
        keys.new_empty(*slots.shape, keys.shape[2]),
    ),
)
def gather_tiled_tokens(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V [*slots.shape, head_size], a copy of what these slots hold.

    keys:   [num_pages, block_size, head_size], elements of 1, 2 or 4 bytes: tiled pages, each contiguous, of which
            block_size and head_size are multiples of 16
    values: likewise
    slots:  [...] int64, page_id * block_size + offset

    Uses csrc/cpu/tiled_tokens.cpp where it was built, else ``gather_tiled_tokens_reference``.

    Raises ValueError for a wrong shape, dtype or stride, or a slot outside the pool.
    """
    check_arguments(keys, values)
    check_slots("slots", slots, keys)
    kernel = function("kvevict_gather_tiled_tokens", keys.device)
    if kernel is None:
        return gather_tiled_tokens_reference(keys, values, slots)
    slots = slots.contiguous()
    gathered = keys.new_empty(*slots.shape, keys.shape[2]), keys.new_empty(*slots.shape, keys.shape[2])
    kernel(
        *_flat(keys, values), slots.data_ptr(), *(part.data_ptr() for part in gathered), slots.numel(),
        keys.element_size(),
    )  # fmt: skip
    return gathered


@operator("(Tensor(a!) keys, Tensor(b!) values, Tensor source, Tensor destination) -> ()", fake=lambda *arguments: None)
def move_tiled_tokens(
    keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, destination: torch.Tensor
) -> None:
    """In place: copy the K and V of each token from slot ``source[i]`` to slot ``destination[i]``, bit for bit.

    keys, values:        as for ``gather_tiled_tokens``
    source, destination: as for ``move_tokens``

    Uses csrc/cpu/tiled_tokens.cpp where it was built, else ``move_tiled_tokens_reference``.

    Raises ValueError as ``gather_tiled_tokens`` does, or for slots of different numbers.
    """
    check_arguments(keys, values)
    check_slots("source", source, keys, least=-1)
    check_slots("destination", destination, keys, least=-1)
    if source.shape != destination.shape:
        raise ValueError(f"`destination`: expected slots {tuple(source.shape)}, got {tuple(destination.shape)}.")
    kernel = function("kvevict_move_tiled_tokens", keys.device)
    if kernel is None:
        return move_tiled_tokens_reference(keys, values, source, destination)
    source, destination = source.contiguous(), destination.contiguous()
    kernel(*_flat(keys, values), source.data_ptr(), destination.data_ptr(), source.numel(), keys.element_size())


def _flat(keys: torch.Tensor, values: torch.Tensor) -> tuple[int, ...]:
    return keys.data_ptr(), values.data_ptr(), keys.stride(0), *keys.shape[1:]


def check_arguments(keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raise ValueError unless the pages are as ``gather_tiled_tokens`` documents them."""
    for name, pages in (("keys", keys), ("values", values)):
        is_tiled = pages.dim() == 3 and 0 not in pages.shape and not any(size % TILE for size in pages.shape[1:])
        if not is_tiled or pages.stride()[1:] != (pages.shape[2], 1) or pages.element_size() not in ELEMENT_VIEWS:
            raise ValueError(
                f"`{name}`: expected contiguous pages [num_pages, block_size, head_size], sizes being multiples of "
                f"{TILE}, of 1, 2 or 4 bytes, got {pages.dtype} {tuple(pages.shape)}, strides {pages.stride()}."
            )
    if values.shape != keys.shape or values.stride() != keys.stride() or values.dtype != keys.dtype:
        raise ValueError(f"`values`: expected what `keys` are, {keys.dtype} {tuple(keys.shape)}, got {values.dtype} "
                         f"{tuple(values.shape)}, strides {values.stride()}.")  # fmt: skip


def tiled_offsets(block_size: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [block_size, head_size] int64 twice: where in a page each element of K and of V is."""
    token, dim = torch.arange(block_size)[:, None], torch.arange(head_size)
    keys = token // TILE * TILE * head_size + dim // 2 * 2 * TILE + token % TILE * 2 + dim % 2
    return keys, dim // TILE * TILE * block_size + token // 2 * 2 * TILE + dim % TILE * 2 + token % 2


def _places(pages: torch.Tensor, offsets: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the elements of every page [num_pages, page_elements], a view, and indices into them for some slots."""
    elements = pages.view(ELEMENT_VIEWS[pages.element_size()]).flatten(1)
    return elements, offsets.to(slots.device)[slots % pages.shape[1]]


def gather_tiled_tokens_reference(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of ``gather_tiled_tokens`` in plain torch: same arguments and result."""
    gathered = []
    for pages, offsets in zip((keys, values), tiled_offsets(*keys.shape[1:]), strict=True):
        elements, places = _places(pages, offsets, slots)
        gathered.append(elements[(slots // keys.shape[1])[..., None], places].view(pages.dtype))
    return gathered[0], gathered[1]


def move_tiled_tokens_reference(
    keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, destination: torch.Tensor
) -> None:
    """In place: the definition of ``move_tiled_tokens`` in plain torch, same arguments."""
    is_move = (source >= 0) & (destination >= 0)
    source, destination = source[is_move], destination[is_move]
    for pages, offsets in zip((keys, values), tiled_offsets(*keys.shape[1:]), strict=True):
        elements, places = _places(pages, offsets, source)
        moved = elements[(source // keys.shape[1])[..., None], places]
        elements, places = _places(pages, offsets, destination)
        elements[(destination // keys.shape[1])[..., None], places] = moved
