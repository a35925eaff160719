"""Moves cached tokens from slot to slot: the copies of a compaction."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvevict.kernels.native import cuda_function, cuda_library, function
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.optional_triton import tl, triton
from vllm_kvevict.kernels.paged import ELEMENT_VIEWS, check_slots

_TOKENS, _DIMS, _NUM_WARPS = 32, 32, 4  # a program copies 32 elements of 32 tokens at once
# The kernel is compiled for no number of tokens, and for slots that may be a view of those of all layers.
_VARYING, _UNALIGNED = ("num_tokens",), ("source_ptr", "destination_ptr")


@operator("(Tensor(a!) keys, Tensor(b!) values, Tensor source, Tensor destination) -> ()", fake=lambda *arguments: None)
def move_tokens(keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, destination: torch.Tensor) -> None:
    """In place: copy the K and V of each token from slot ``source[i]`` to slot ``destination[i]``, bit for bit.

    keys:        [num_pages, block_size, head_size], any dtype of 1, 2 or 4 bytes and any strides: a view of the whole
                 pool of pages, a page being block_size tokens of one KV head
    values:      [num_pages, block_size, value_head_size], as the keys; element size of the keys
    source:      [num_tokens] int64, contiguous; slot = page_id * block_size + offset
    destination: [num_tokens] int64, contiguous. Where it or the source is -1 nothing is copied

    No slot may be both a source and a destination, and no destination may occur twice: tokens are copied in parallel,
    in no order, without scratch memory. This is not checked. ``num_tokens`` may be zero.

    CPU tensors use csrc/cpu/move_tokens.cpp where it was built, CUDA tensors csrc/cuda/move_tokens.cu where it was,
    else the Triton kernel; everything else ``move_tokens_reference``.

    Raises ValueError for a wrong shape, dtype, device or stride and, on CPU, for a slot outside the pool, which would
    have to wait for a GPU.
    """
    check_arguments(keys, values, source, destination)
    if source.numel() == 0:
        return
    if keys.device.type == "cuda":
        launch = move_tokens_triton if cuda_library() is None else move_tokens_cuda
        return launch(keys, values, source, destination)
    kernel = function("kvevict_move_tokens", keys.device)
    if kernel is None:
        return move_tokens_reference(keys, values, source, destination)
    kernel(*_flat(keys, values, source, destination))


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
        if slots.dim() != 1 or not slots.is_contiguous():
            raise ValueError(
                f"`{name}`: expected contiguous slots [num_tokens], "
                f"got shape {tuple(slots.shape)}, strides {slots.stride()}."
            )
        check_slots(name, slots, keys, least=-1)
    if source.shape != destination.shape:
        raise ValueError(
            f"`destination`: expected as many slots as `source` ({source.numel()}), got {destination.numel()}."
        )


def move_tokens_triton(
    keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, destination: torch.Tensor
) -> None:
    """In place: launch the kernel of ``move_tokens``, K and V in programs of their own; same arguments."""
    element = ELEMENT_VIEWS[keys.element_size()]
    keys, values = keys.view(element), values.view(element)
    num_tokens, block_size = source.numel(), keys.shape[1]
    _move_tokens_kernel[(triton.cdiv(num_tokens, _TOKENS), 2)](
        keys, *keys.stride(), keys.shape[2],
        values, *values.stride(), values.shape[2],
        source, destination, num_tokens, block_size,
        TOKENS=_TOKENS, DIMS=_DIMS, num_warps=_NUM_WARPS,
    )  # fmt: skip


def move_tokens_cuda(keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, destination: torch.Tensor) -> None:
    """In place: launch csrc/cuda/move_tokens.cu, which must have been built; same arguments."""
    kernel = cuda_function("kvevict_cuda_move_tokens")
    with torch.cuda.device(keys.device):
        kernel(*_flat(keys, values, source, destination))


def _flat(keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, destination: torch.Tensor) -> tuple[int, ...]:
    return (
        keys.data_ptr(), *keys.stride(), keys.shape[2],
        values.data_ptr(), *values.stride(), values.shape[2],
        source.data_ptr(), destination.data_ptr(), source.numel(),
        keys.shape[1], keys.element_size(),
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _move_tokens_kernel(
    key_ptr, key_stride_page, key_stride_token, key_stride_dim, key_head_size,
    value_ptr, value_stride_page, value_stride_token, value_stride_dim, value_head_size,
    source_ptr, destination_ptr, num_tokens, block_size,
    TOKENS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    # one program: K or V of TOKENS moves
    move = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    source = tl.load(source_ptr + move, mask=move < num_tokens, other=-1)
    destination = tl.load(destination_ptr + move, mask=move < num_tokens, other=-1)
    is_move = (source >= 0) & (destination >= 0)
    if tl.program_id(1) == 0:
        _move_tile(
            key_ptr, key_stride_page, key_stride_token, key_stride_dim, key_head_size,
            source, destination, is_move, block_size, DIMS,
        )  # fmt: skip
    else:
        _move_tile(
            value_ptr, value_stride_page, value_stride_token, value_stride_dim, value_head_size,
            source, destination, is_move, block_size, DIMS,
        )  # fmt: skip


@triton.jit
def _move_tile(
    ptr, stride_page, stride_token, stride_dim, head_size, source, destination, is_move, block_size, DIMS: tl.constexpr
):
    # slots are int64, and so is everything that is multiplied by a stride of a page
    from_token = ptr + source // block_size * stride_page + source % block_size * stride_token
    to_token = ptr + destination // block_size * stride_page + destination % block_size * stride_token
    for start in range(0, head_size, DIMS):
        dim = start + tl.arange(0, DIMS)
        mask = is_move[:, None] & (dim < head_size)[None, :]
        elements = tl.load(from_token[:, None] + dim[None, :] * stride_dim, mask=mask)
        tl.store(to_token[:, None] + dim[None, :] * stride_dim, elements, mask=mask)


def triton_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Return kernel, argument types, constants and warps of every kernel here, to compile it without a GPU."""
    types = dict.fromkeys(_move_tokens_kernel.arg_names, "i32")
    types |= {"key_ptr": "*i16", "value_ptr": "*i16", "source_ptr": "*i64", "destination_ptr": "*i64"}
    constants = {"TOKENS": _TOKENS, "DIMS": _DIMS}
    types = {name: type_ for name, type_ in types.items() if name not in constants}
    return [(_move_tokens_kernel, types, constants, _NUM_WARPS)]


def move_tokens_reference(
    keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, destination: torch.Tensor
) -> None:
    """In place: the definition of ``move_tokens`` in plain torch, same arguments."""
    block_size, is_move = keys.shape[1], (source >= 0) & (destination >= 0)
    source, destination = source[is_move], destination[is_move]
    for pool in (keys, values):
        # indexing is not defined for every 8-bit float
        elements = pool.view(ELEMENT_VIEWS[pool.element_size()])
        elements[destination // block_size, destination % block_size] = elements[
            source // block_size, source % block_size
        ]
