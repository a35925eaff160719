"""Attention that the last queries of a request pay to each of its cached keys, read through the page table."""

import torch

from vllm_kvevict.kernels.native import FLOAT, INT32, INT64, POINTER, function

# The numbers are those of `enum Dtype` in csrc/cpu/element.hpp.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.float8_e5m2: 4}
QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_ARGTYPES = (
    *(POINTER, INT64, INT64),  # query: data, strides
    *(POINTER, INT64, INT64, INT64),  # keys: data, strides
    *(POINTER, INT64),  # page_table: data, stride of a head
    POINTER,  # column_sums
    *(INT32, INT32, INT64, INT64, INT64, INT64, INT64, INT64, FLOAT),  # dtypes, sizes, scale
)


def window_attention(
    query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor, kv_len: int, scale: float
) -> torch.Tensor:
    """Sum the softmax attention of the last ``window`` queries of one request over those queries.

    query:      [window, num_heads, head_size] float32 | bfloat16 | float16, RoPE applied, last dimension contiguous.
                Query i is the token at cache index kv_len - window + i and sees the keys up to itself.
    keys:       [num_pages, block_size, head_size], dtype of the query or float8_e4m3fn | float8_e5m2, RoPE applied: a
                view of the whole pool of pages, a page being block_size tokens of one KV head. The token or the
                head_size dimension is contiguous.
    page_table: [num_kv_heads, max_pages] int64, page id of each logical page of each KV head. Entries past
                ceil(kv_len / block_size) and slots past kv_len are never read.
    kv_len:     tokens in the cache, at least window
    scale:      softmax scale, normally head_size ** -0.5; times what stored keys are to be multiplied by, if anything
    returns:    [num_heads, kv_len] float32; query head h uses KV head h // (num_heads / num_kv_heads), and every row
                sums to window

    CPU tensors use csrc/cpu/window_attention.cpp where it was built. Its scratch memory is a float32 copy of the query
    and of 64 keys per thread, and 8 bytes for each query row and 256 keys; never [window, kv_len]. Its result does not
    depend on the number of threads. Everything else uses ``window_attention_reference``.

    Raises ValueError for a wrong shape, dtype, device or stride, or a page id outside the pool; MemoryError if the
    scratch memory cannot be had.
    """
    check_arguments(query, keys, page_table, kv_len)
    kernel = function("kvevict_window_attention", *_ARGTYPES) if query.device.type == "cpu" else None
    if kernel is None:
        return window_attention_reference(query, keys, page_table, kv_len, scale)
    window, num_heads, head_size = query.shape
    column_sums = torch.empty(num_heads, kv_len, dtype=torch.float32)
    status = kernel(
        query.data_ptr(), *query.stride()[:2],
        keys.data_ptr(), *keys.stride(),
        page_table.data_ptr(), page_table.stride(0),
        column_sums.data_ptr(),
        DTYPE_CODES[query.dtype], DTYPE_CODES[keys.dtype],
        window, num_heads, page_table.shape[0], head_size, keys.shape[1], kv_len, scale,
    )  # fmt: skip
    if status != 0:
        raise MemoryError(f"window_attention: no scratch memory for {num_heads} heads and {kv_len} tokens.")
    return column_sums


def check_arguments(query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor, kv_len: int) -> None:
    """Raise ValueError unless the arguments are as ``window_attention`` documents them."""
    if query.dim() != 3 or 0 in query.shape or query.stride(2) != 1:
        raise ValueError(
            "`query`: expected [window, num_heads, head_size] with a contiguous last dimension, "
            f"got shape {tuple(query.shape)}, strides {query.stride()}."
        )
    if query.dtype not in QUERY_DTYPES:
        raise ValueError(f"`query`: expected dtype {' or '.join(map(str, QUERY_DTYPES))}, got {query.dtype}.")
    window, num_heads, head_size = query.shape
    if keys.dim() != 3 or 0 in keys.shape or keys.shape[2] != head_size:
        raise ValueError(f"`keys`: expected [num_pages, block_size, {head_size}], got shape {tuple(keys.shape)}.")
    if keys.dtype not in (query.dtype, *FLOAT8_DTYPES) or keys.device != query.device:
        raise ValueError(
            f"`keys`: expected {query.dtype}, or an 8-bit float, on {query.device}; got {keys.dtype} on {keys.device}."
        )
    if 1 not in keys.stride()[1:]:
        raise ValueError(f"`keys`: expected a contiguous token or head_size dimension, got strides {keys.stride()}.")
    if page_table.dim() != 2 or page_table.shape[0] == 0 or num_heads % page_table.shape[0] != 0:
        raise ValueError(
            f"`page_table`: expected [num_kv_heads, max_pages] where num_kv_heads divides {num_heads} query heads, "
            f"got shape {tuple(page_table.shape)}."
        )
    if page_table.dtype != torch.int64 or page_table.device != query.device or page_table.stride(1) != 1:
        raise ValueError(
            f"`page_table`: expected int64 on {query.device} with contiguous rows, "
            f"got {page_table.dtype} on {page_table.device}, strides {page_table.stride()}."
        )
    max_kv_len = page_table.shape[1] * keys.shape[1]
    if not window <= kv_len <= max_kv_len:
        raise ValueError(f"`kv_len`: expected {window} (window) to {max_kv_len} (page table) tokens, got {kv_len}.")
    lowest, highest = page_table[:, : -(-kv_len // keys.shape[1])].aminmax()
    if lowest < 0 or highest >= keys.shape[0]:
        raise ValueError(
            f"`page_table`: expected page ids 0 to {keys.shape[0] - 1}, got {int(lowest)} to {int(highest)}."
        )


def window_attention_reference(
    query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor, kv_len: int, scale: float
) -> torch.Tensor:
    """The definition of ``window_attention`` in plain torch, float32: same arguments and result."""
    window, _, head_size = query.shape
    num_kv_heads, block_size = page_table.shape[0], keys.shape[1]
    pages = page_table[:, : -(-kv_len // block_size)]
    gathered = keys[pages].flatten(1, 2)[:, :kv_len].float()  # [num_kv_heads, kv_len, head_size]
    # [num_kv_heads, group, window, head_size]
    grouped = query.float().transpose(0, 1).reshape(num_kv_heads, -1, window, head_size)
    logits = grouped @ gathered.transpose(1, 2)[:, None] * scale  # [num_kv_heads, group, window, kv_len]
    cache_index = torch.arange(kv_len, device=query.device)
    hidden = cache_index > cache_index[-window:, None]  # [window, kv_len]
    probabilities = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    return probabilities.sum(2).flatten(0, 1)
