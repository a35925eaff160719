"""What ``streaming_sums`` is given: the queries of a step and the cache; and the checks of chunks of queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from vllm_kvevict.kernels.paged import (
    check_contiguous,
    check_groups,
    check_keys_of,
    check_logits,
    check_page_ids,
    check_page_table,
    check_query,
    check_rows,
)


@dataclass(frozen=True)
class ChunkBatch:
    """A chunk of queries of each of several requests, and one layer of their cache. Read only.

    query:           [num_tokens, num_heads, head_size] float32 | bfloat16 | float16, RoPE applied, last dimension
                     contiguous: the chunks one behind another. Query i of a request is the token at cache index
                     kv_len - num_queries + i and sees the keys up to itself
    keys:            [num_pages, block_size, head_size], dtype of the query or float8_e4m3fn | float8_e5m2, RoPE
                     applied: a view of the whole pool of pages. The token or the head_size dimension is contiguous
    page_table:      [num_reqs, num_kv_heads, max_pages] int64, page id of each logical page of each KV head, rows
                     contiguous. Entries past ceil(kv_len / block_size) and slots past kv_len are never read
    query_start_loc: [num_reqs + 1] int64, contiguous: where in ``query`` the chunk of each request begins, and where
                     the last one ends. A chunk may be empty
    kv_start_loc:    [num_reqs + 1] int64, contiguous: likewise where in the sums the tokens of each request begin.
                     kv_len, which is what lies between, is num_queries at least
    max_query_len:   the most queries of a request, or more
    max_kv_len:      the largest kv_len, or more, as far as the page table goes
    scale:           softmax scale; times what stored keys are to be multiplied by, if anything
    softcap:         as in ``WindowBatch``
    sinks:           [num_heads] likewise
    """

    query: torch.Tensor
    keys: torch.Tensor
    page_table: torch.Tensor
    query_start_loc: torch.Tensor
    kv_start_loc: torch.Tensor
    max_query_len: int
    max_kv_len: int
    scale: float
    softcap: float = 0.0
    sinks: torch.Tensor | None = None


def check_arguments(query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor) -> None:
    """Raise ValueError unless they are as ``ChunkBatch`` has them, as far as it shows without reading a tensor."""
    check_query(query, "num_tokens", "num_heads", "head_size")
    check_keys_of(query, keys)
    check_page_table(page_table, query.device, len(page_table))
    check_groups(query.shape[1], page_table.shape[1])


def check_batch(batch: ChunkBatch, sums: torch.Tensor) -> None:
    """Raise ValueError unless the arguments are as documented, as far as it shows without reading a tensor."""
    check_arguments(batch.query, batch.keys, batch.page_table)
    num_reqs, num_kv_heads, max_pages = batch.page_table.shape
    device, most = batch.query.device, max_pages * batch.keys.shape[1]
    for name in ("query_start_loc", "kv_start_loc"):
        check_contiguous(name, getattr(batch, name), (num_reqs + 1,), torch.int64, device)
    check_logits(batch.softcap, batch.sinks, (batch.query.shape[1],), device)
    if batch.max_kv_len > most:
        raise ValueError(f"`max_kv_len`: expected at most {most} tokens (page table), got {batch.max_kv_len}.")
    if sums.dim() != 2 or len(sums) != num_kv_heads:
        raise ValueError(f"`sums`: expected [{num_kv_heads}, kv_start_loc[-1]], got shape {tuple(sums.shape)}.")
    check_rows("sums", sums, device, torch.float32)


def check_lengths(batch: ChunkBatch, sums: torch.Tensor) -> None:
    """Raise ValueError unless every length and every page id that is read is as documented."""
    num_sums = sums.shape[1]
    if batch.kv_start_loc[-1] != num_sums:
        raise ValueError(f"`kv_start_loc`: expected an end of {num_sums} (sums), got {int(batch.kv_start_loc[-1])}.")
    for pages, queries, tokens in requests(batch):
        if not 0 <= tokens.start <= tokens.stop <= num_sums:
            raise ValueError(
                f"`kv_start_loc`: expected a request among {num_sums} sums, got {tokens.start} to {tokens.stop}."
            )
        for name, places in (("query", queries), ("kv", tokens)):
            most = getattr(batch, f"max_{name}_len")
            if len(places) > most:
                raise ValueError(f"`max_{name}_len`: expected at least {len(places)}, got {most}.")
        check_chunk(batch.query, batch.keys, pages, queries, range(len(tokens)))


def requests(batch: ChunkBatch) -> Iterator[tuple[torch.Tensor, range, range]]:
    """Yield for each request its pages [num_kv_heads, max_pages], and which queries and which of the sums are its."""
    queries, tokens = (pairwise(starts.tolist()) for starts in (batch.query_start_loc, batch.kv_start_loc))
    for pages, of_queries, of_tokens in zip(batch.page_table, queries, tokens, strict=True):
        yield pages, range(*of_queries), range(*of_tokens)


def check_chunk(query: torch.Tensor, keys: torch.Tensor, pages: torch.Tensor, queries: range, tokens: range) -> None:
    """Raise ValueError unless ``queries`` are rows of ``query`` and no more than the tokens, which lie in the pool.

    pages:  [num_kv_heads, max_pages], those of the request
    tokens: cache indices
    """
    if not 0 <= queries.start <= queries.stop <= len(query):
        raise ValueError(
            f"`query`: expected a chunk among {len(query)} rows, got one from {queries.start} to {queries.stop}."
        )
    if not queries:
        return
    block_size = keys.shape[1]
    max_kv_len = pages.shape[1] * block_size
    if tokens.start < 0 or len(queries) > len(tokens) or tokens.stop > max_kv_len:
        raise ValueError(
            f"`query`: expected {len(queries)} tokens among {max_kv_len} of the page table, "
            f"got {tokens.start} to {tokens.stop}."
        )
    check_page_ids(pages[:, tokens.start // block_size : -(-tokens.stop // block_size)], len(keys))
