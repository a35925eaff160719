"""What ``window_scores`` is given: the last queries of a batch, its cache, and how attention becomes scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vllm_kvevict.kernels.paged import (
    check_contiguous,
    check_groups,
    check_keys_of,
    check_logits,
    check_page_ids,
    check_page_table,
    check_query,
)

# The numbers are those of the enums in csrc/cpu/window_scores.cpp.
GROUP_CODES = {"sum": 0, "mean": 0, "max": 1}
POOL_CODES = {"max": 0, "avg": 1}
WEIGHT_CODES = {"none": 0, "value_norm": 1, "largest_value_norm": 2}


@dataclass(frozen=True)
class WindowBatch:
    """The last queries of several requests and one layer of their cache. Read only.

    query:       [num_reqs, window, num_heads, head_size] float32 | bfloat16 | float16, RoPE applied, last dimension
                 contiguous. Query i is the token at cache index kv_len - window + i and sees the keys up to itself.
    keys:        [num_pages, block_size, head_size], dtype of the query or float8_e4m3fn | float8_e5m2, RoPE applied: a
                 view of the whole pool of pages, a page being block_size tokens of one KV head. The token or the
                 head_size dimension is contiguous.
    values:      [num_pages, block_size, value_head_size] likewise, last dimension contiguous; read for a weight only
    page_table:  [num_reqs, num_kv_heads, max_pages] int64, page id of each logical page of each KV head. Entries past
                 ceil(kv_len / block_size) and slots past kv_len are never read.
    kv_lens:     [num_reqs] int64, contiguous, tokens in the cache, at least window
    max_kv_len:  the largest of them, or more
    scale:       softmax scale, normally head_size ** -0.5; times what stored keys are to be multiplied by, if anything
    value_scale: what stored values are to be multiplied by
    softcap:     logits x become softcap * tanh(x / softcap); 0: they stay
    sinks:       [num_reqs, num_heads] float32, contiguous: the logit of a sink, which takes a part of the attention of
                 each query head, and which no key has; None: there are none
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    page_table: torch.Tensor
    kv_lens: torch.Tensor
    max_kv_len: int
    scale: float
    value_scale: float = 1.0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Reduction:
    """How the attention that a token gets from the queries and the heads of a group becomes one score.

    group:       over the query heads of one KV head, of which each is a mean over the queries
    pool:        how neighbours share what they get; beside what is scored "avg" counts zeros
    pool_kernel: width in tokens of the pool, odd
    weight:      what the pooled number is multiplied by: the l1 norm of the token's value, or the largest such norm of
                 the tokens of its KV head that are scored
    own_columns: whether the queries' own tokens are scored too; if not, they lend nothing to their neighbours
    """

    group: Literal["mean", "max", "sum"] = "mean"
    pool: Literal["max", "avg"] = "max"
    pool_kernel: int = 1
    weight: Literal["none", "value_norm", "largest_value_norm"] = "none"
    own_columns: bool = False

    def query_weight(self, window: int, group: int) -> float:
        """What one probability counts in the sum over a group, or in a sum of which the maximum is taken."""
        return 1 / (window * group) if self.group == "mean" else 1 / window

    def num_unscored(self, window: int) -> int:
        """Tokens at the end of a request that get no score."""
        return 0 if self.own_columns else window


def check_arguments(batch: WindowBatch, reduction: Reduction) -> None:
    """Raise ValueError unless the arguments are as documented, as far as it shows without reading a tensor."""
    query, keys, values, page_table, kv_lens = batch.query, batch.keys, batch.values, batch.page_table, batch.kv_lens
    check_query(query, "num_reqs", "window", "num_heads", "head_size")
    num_reqs, window, num_heads, _ = query.shape
    check_keys_of(query, keys)
    if values.dim() != 3 or values.shape[:2] != keys.shape[:2] or values.stride(2) != 1:
        raise ValueError(
            f"`values`: expected [{keys.shape[0]}, {keys.shape[1]}, value_head_size] with a contiguous last dimension, "
            f"got shape {tuple(values.shape)}, strides {values.stride()}."
        )
    if values.dtype != keys.dtype or values.device != keys.device:
        raise ValueError(f"`values`: expected {keys.dtype} on {keys.device}; got {values.dtype} on {values.device}.")
    check_page_table(page_table, query.device, num_reqs)
    check_groups(num_heads, page_table.shape[1])
    check_contiguous("kv_lens", kv_lens, (num_reqs,), torch.int64, query.device)
    check_logits(batch.softcap, batch.sinks, (num_reqs, num_heads), query.device)
    if not window <= batch.max_kv_len <= page_table.shape[2] * keys.shape[1]:
        raise ValueError(
            f"`max_kv_len`: expected {window} (window) to {page_table.shape[2] * keys.shape[1]} (page table) tokens, "
            f"got {batch.max_kv_len}."
        )
    if reduction.pool_kernel < 1 or reduction.pool_kernel % 2 == 0:
        raise ValueError(f"`reduction.pool_kernel`: expected an odd number, at least 1, got {reduction.pool_kernel}.")
    for name, codes in (("group", GROUP_CODES), ("pool", POOL_CODES), ("weight", WEIGHT_CODES)):
        if getattr(reduction, name) not in codes:
            expected = " or ".join(map(repr, codes))
            raise ValueError(f"`reduction.{name}`: expected {expected}, got {getattr(reduction, name)!r}.")


def check_lengths(batch: WindowBatch) -> None:
    """Raise ValueError unless every length and every page id that is read is as documented."""
    window, (num_pages, block_size) = batch.query.shape[1], batch.keys.shape[:2]
    fewest, most = map(int, batch.kv_lens.aminmax())
    if fewest < window or most > batch.max_kv_len:
        wrong = fewest if fewest < window else most
        raise ValueError(f"`kv_lens`: expected {window} (window) to {batch.max_kv_len} tokens, got {wrong}.")
    page_ids = batch.page_table[..., : -(-most // block_size)]
    if fewest < most:
        first_token = torch.arange(page_ids.shape[2]) * block_size
        page_ids = page_ids.masked_fill(first_token >= batch.kv_lens[:, None, None], 0)
    check_page_ids(page_ids, num_pages)
