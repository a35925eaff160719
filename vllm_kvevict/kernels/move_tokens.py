"""Moves cached tokens from slot to slot: the copies of a compaction."""

import torch

from vllm_kvevict.kernels.native import INT64, POINTER, function

ELEMENT_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_POOL = (POINTER, INT64, INT64, INT64, INT64)  # data, strides, head_size
_ARGTYPES = (*_POOL, *_POOL, POINTER, POINTER, INT64, INT64, INT64)


def move_tokens(keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, destination: torch.Tensor) -> None:
    """In place: copy the K and V of each token from slot ``source[i]`` to slot ``destination[i]``, bit for bit.

    keys:        [num_pages, block_size, head_size], any dtype of 1, 2 or 4 bytes and any strides: a view of the whole
                 pool of pages, a page being block_size tokens of one KV head
    values:      [num_pages, block_size, value_head_size], as the keys; element size of the keys
    source:      [num_tokens] int64, contiguous; slot = page_id * block_size + offset
    destination: [num_tokens] int64, contiguous

    No slot may be both a source and a destination, and no destination may occur twice: tokens are copied in parallel,
    in no order, without scratch memory. This is not checked. ``num_tokens`` may be zero.

    CPU tensors use csrc/cpu/move_tokens.cpp where it was built, everything else ``move_tokens_reference``.

    Raises ValueError for a wrong shape, dtype, device or stride, or a slot outside the pool.
    """
    check_arguments(keys, values, source, destination)
    if source.numel() == 0:
        return
    kernel = function("kvevict_move_tokens", *_ARGTYPES) if keys.device.type == "cpu" else None
    if kernel is None:
        return move_tokens_reference(keys, values, source, destination)
    kernel(
        keys.data_ptr(), *keys.stride(), keys.shape[2],
        values.data_ptr(), *values.stride(), values.shape[2],
        source.data_ptr(), destination.data_ptr(), source.numel(),
        keys.shape[1], keys.element_size(),
    )  # fmt: skip


def check_arguments(keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, destination: torch.Tensor) -> None:
    """Raise ValueError unless the arguments are as ``move_tokens`` documents them."""
    if keys.dim() != 3 or 0 in keys.shape:
        raise ValueError(f"`keys`: expected [num_pages, block_size, head_size], got shape {tuple(keys.shape)}.")
    if keys.element_size() not in ELEMENT_VIEWS:
        raise ValueError(f"`keys`: expected elements of 1, 2 or 4 bytes, got {keys.dtype}.")
    if values.dim() != 3 or values.shape[:2] != keys.shape[:2]:
        raise ValueError(
            f"`values`: expected [{keys.shape[0]}, {keys.shape[1]}, head_size], got shape {tuple(values.shape)}."
        )
    if values.element_size() != keys.element_size() or values.device != keys.device:
        raise ValueError(
            f"`values`: expected elements of {keys.element_size()} bytes on {keys.device}, "
            f"got {values.dtype} on {values.device}."
        )
    for name, slots in (("source", source), ("destination", destination)):
        if slots.dim() != 1 or slots.dtype != torch.int64 or not slots.is_contiguous() or slots.device != keys.device:
            raise ValueError(
                f"`{name}`: expected contiguous int64 slots [num_tokens] on {keys.device}, "
                f"got {slots.dtype} {tuple(slots.shape)} on {slots.device}, strides {slots.stride()}."
            )
    if source.shape != destination.shape:
        raise ValueError(
            f"`destination`: expected as many slots as `source` ({source.numel()}), got {destination.numel()}."
        )
    num_slots = keys.shape[0] * keys.shape[1]
    for name, slots in (("source", source), ("destination", destination)):
        if slots.numel() > 0:
            lowest, highest = slots.aminmax()
            if lowest < 0 or highest >= num_slots:
                raise ValueError(f"`{name}`: expected slots 0 to {num_slots - 1}, got {int(lowest)} to {int(highest)}.")


def move_tokens_reference(
    keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, destination: torch.Tensor
) -> None:
    """In place: the definition of ``move_tokens`` in plain torch, same arguments."""
    block_size = keys.shape[1]
    for pool in (keys, values):
        # as integers: indexing is not defined for every 8-bit float, and no NaN payload may change
        elements = pool.view(ELEMENT_VIEWS[pool.element_size()])
        elements[destination // block_size, destination % block_size] = elements[
            source // block_size, source % block_size
        ]
