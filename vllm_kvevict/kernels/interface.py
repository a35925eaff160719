"""The C interface of the compiled kernels: what csrc declares, said once for Python.

A library carries the digest of the declarations that it was built from. One of another digest would read other
arguments than it is given, and memory that is not its own: it is refused. The build runs this file by itself.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable
from typing import Any

POINTER, INT32, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_WORDS: dict[Any, str] = {POINTER: "pointer", INT32: "int32_t", INT64: "int64_t", FLOAT: "float"}

_PAGES = (POINTER, INT64, INT64, INT64)  # data, strides
_POOL = (*_PAGES, INT64)  # and the head size
_TILED_POOL = (POINTER, POINTER, INT64, INT64, INT64)  # keys, values, stride_page, block_size, head_size
_QUERY = (POINTER, INT64, INT64)  # data, strides
_PAGE_TABLE = (POINTER, INT64)  # data, stride of a head
_PAGE_TABLES = (POINTER, INT64, INT64)  # of several requests: data, strides
_MOVE = (*_POOL, *_POOL, POINTER, POINTER, INT64, INT64, INT64)
_LOGITS = (FLOAT, POINTER)  # softcap; sinks, which may be null
_SELECT = (POINTER, POINTER, POINTER, POINTER, INT64, INT64, INT64, INT64)  # kv_lens, the third, may be null
_ROTATED_KEYS = (
    *_PAGES,
    *(POINTER, INT64, INT64, POINTER),  # page_table: data, strides; blocks
    *(INT32, INT64, INT64, INT64, INT64, FLOAT),  # dtype, sizes, key_scale
    *(POINTER, INT64, INT32, INT64, INT32),  # cos_sin: data, stride, dtype, rotary_dim; is_neox_style
)

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "kvevict_chunk_attention": (
        *_QUERY,
        *_PAGES,
        *_PAGE_TABLES,
        *(POINTER, POINTER),  # chunks, received
        *(INT32, INT32, *(INT64,) * 7, FLOAT, INT32),  # dtypes, sizes, scale, take_max
    ),
    "kvevict_count_best": (POINTER, POINTER, POINTER, POINTER, INT64, INT64, INT64),
    "kvevict_expand_page_table": (
        *[POINTER] * 5,  # the lists, as PageLists has them
        *[INT64] * 5,  # num_entries, max_num_reqs, blocks of a request's lists, num_layers, num_kv_heads
        *[POINTER] * 4,  # the batch, as BatchRows has it
        *[INT64] * 4,  # num_rows, num_reqs; block_table: stride of a request, blocks of a request
        *(INT64, POINTER, INT64, INT64, INT64),  # first_layer, first_pages, layers, block_stride, block_size
        *(POINTER, POINTER, INT64),  # pages, kv_lens, width
    ),
    "kvevict_gather_tiled_tokens": (*_TILED_POOL, POINTER, POINTER, POINTER, INT64, INT64),
    "kvevict_key_moments": (*_ROTATED_KEYS, POINTER, POINTER),  # total, moment
    "kvevict_mapped_norms": (
        *_ROTATED_KEYS,
        POINTER,
        POINTER,
        INT64,
        POINTER,
        INT64,
    ),  # mean, map, columns, norms, its width
    "kvevict_move_tiled_tokens": (*_TILED_POOL, POINTER, POINTER, INT64, INT64),
    "kvevict_move_tokens": _MOVE,
    "kvevict_select": _SELECT,
    "kvevict_slot_scores": (
        *(POINTER, INT64, INT64, INT64),  # query: data, strides
        *_PAGES,  # keys
        *_PAGE_TABLES,
        *(POINTER, POINTER, POINTER),  # positions, last_seen, scores
        *(INT32, INT32, *(INT64,) * 7),  # dtypes, sizes
        *(FLOAT, FLOAT, *_LOGITS, INT32, INT32),  # scale, query_weight, codes of the reductions
    ),
    "kvevict_streaming_sums": (
        *_QUERY,
        *_PAGES,
        *_PAGE_TABLES,
        *(POINTER, POINTER),  # query_start_loc, kv_start_loc
        *(POINTER, INT64, POINTER, INT64),  # sums: data, stride of a head; columns, parts_per_head
        *(INT32, INT32, INT64, INT64, INT64, INT64, INT64, INT64, FLOAT),  # dtypes, sizes, scale
        *_LOGITS,
    ),
    "kvevict_window_scores": (
        *(POINTER, INT64, INT64, INT64),  # query: data, strides
        *(*_PAGES, *_PAGES),  # keys, values
        *_PAGE_TABLES,
        *(POINTER, POINTER),  # kv_lens, scores
        *(INT32, INT32, *(INT64,) * 9),  # dtypes, sizes
        *(FLOAT, FLOAT, FLOAT, *_LOGITS),  # scale, query_weight, value_scale
        *(INT32, INT32, INT32, INT64),  # codes of the reduction, pool_kernel
    ),
    # for tests: limits the instruction set to so many floats per vector, allows AMX, allows products of pairs of
    # bfloat16; all return what is then used
    "kvevict_limit_lanes": (INT32,),
    "kvevict_allow_tiles": (INT32,),
    "kvevict_allow_pairs": (INT32,),
}
CUDA_SIGNATURES: dict[str, tuple[Any, ...]] = {  # the last argument is the stream
    "kvevict_cuda_move_tokens": (*_MOVE, POINTER),
    "kvevict_cuda_select": (*_SELECT, POINTER),
}


def declarations(signatures: dict[str, tuple[Any, ...]]) -> list[str]:
    """Return a line for each function: its name and the kinds of its arguments. All of them return an int32_t."""
    return [f"{name}({', '.join(_WORDS[kind] for kind in kinds)})" for name, kinds in signatures.items()]


def digest(lines: Iterable[str]) -> str:
    """Return what a library says that was built from these declarations."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]
