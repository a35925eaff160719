"""A cache as vLLM would allocate it, of which only what a test wrote holds numbers: everything else is NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.pages import Packing, PagePool

Layout = Literal["LBHNC", "BLHNC"]
PACKINGS: tuple[Packing, ...] = ("transposed", "interleaved", "tiled")
LAYOUTS: tuple[Layout, ...] = ("LBHNC", "BLHNC")
NULL_BLOCK = 0


@dataclass(frozen=True)
class PagedCache:
    """A pool and the views it was made from.

    layers: per layer [num_blocks, num_kv_heads, block_size, 2 * head_size]
    """

    pool: PagePool
    layers: list[torch.Tensor]
    packing: Packing
    layout: Layout

    @property
    def num_blocks(self) -> int:
        return self.layers[0].shape[0]

    def page_id(self, layer: int, block: int, head: int) -> int:
        """Where the page of (layer, block, KV head) lies, by counting."""
        num_layers, num_heads = len(self.layers), self.layers[0].shape[1]
        if self.layout == "LBHNC":
            return (layer * self.num_blocks + block) * num_heads + head
        return (block * num_layers + layer) * num_heads + head

    def write(self, keys: torch.Tensor, values: torch.Tensor, block_ids: torch.Tensor) -> None:
        """Put a request's K and V, each [num_layers, num_kv_heads, num_tokens, head_size], into its blocks."""
        block_size, num_tokens = self.pool.block_size, keys.shape[2]
        for layer, cache in enumerate(self.layers):
            for index, block in enumerate(block_ids.tolist()):
                start, end = index * block_size, min((index + 1) * block_size, num_tokens)
                key_slots, value_slots = self._slots(cache[block])
                key_slots[:, : end - start] = keys[layer, :, start:end]
                value_slots[:, : end - start] = values[layer, :, start:end]
                if self.packing == "tiled":
                    _tile(cache[block], key_slots, value_slots)

    def read(self, page_ids: torch.Tensor, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V [kv_len, head_size] of the first tokens of these pages, without the pool's own views."""
        pages = self.pool.pages[page_ids].unflatten(1, (self.pool.block_size, -1))
        keys, values = self._slots(pages)
        return keys.flatten(0, 1)[:kv_len], values.flatten(0, 1)[:kv_len]

    def _slots(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split pages [n, block_size, 2 * head_size] into K and V [n, block_size, head_size]: views, unless tiled."""
        num_pages, block_size, content = pages.shape
        head_size = content // 2
        if self.packing == "interleaved":
            return pages[..., :head_size], pages[..., head_size:]
        halves = pages.view(num_pages, 2, block_size * head_size)
        if self.packing == "tiled":
            keys = halves[:, 0].reshape(num_pages, block_size // 16, head_size // 2, 16, 2).transpose(2, 3)
            values = halves[:, 1].reshape(num_pages, head_size // 16, block_size // 2, 16, 2).permute(0, 2, 4, 1, 3)
            return keys.reshape(num_pages, block_size, head_size), values.reshape(num_pages, block_size, head_size)
        keys = halves[:, 0].view(num_pages, head_size, block_size).transpose(1, 2)
        return keys, halves[:, 1].view(num_pages, block_size, head_size)


def _tile(pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Store K and V [n, block_size, head_size] in pages [n, block_size, 2 * head_size] as AMX multiplies them."""
    num_pages, block_size, head_size = keys.shape
    halves = pages.view(num_pages, 2, block_size * head_size)
    # pairs of dimensions of 16 tokens; pairs of tokens of 16 dimensions
    halves[:, 0] = keys.reshape(num_pages, -1, 16, head_size // 2, 2).transpose(2, 3).reshape(num_pages, -1)
    halves[:, 1] = values.reshape(num_pages, -1, 2, head_size // 16, 16).permute(0, 3, 1, 4, 2).reshape(num_pages, -1)


def make_layers(
    num_layers: int,
    num_kv_heads: int,
    num_blocks: int,
    block_size: int,
    head_size: int,
    layout: Layout,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Return per-layer views [num_blocks, num_kv_heads, block_size, 2 * head_size] of one allocation full of NaN."""
    block = (num_kv_heads, block_size, 2 * head_size)
    if layout == "LBHNC":
        return list(torch.full((num_layers, num_blocks, *block), float("nan"), dtype=dtype).unbind(0))
    return list(torch.full((num_blocks, num_layers, *block), float("nan"), dtype=dtype).unbind(1))


def make_pool(
    num_layers: int,
    num_kv_heads: int,
    num_blocks: int,
    block_size: int,
    head_size: int,
    packing: Packing = "transposed",
    layout: Layout = "LBHNC",
    dtype: torch.dtype = torch.float32,
) -> PagedCache:
    """Return a cache of ``num_blocks`` blocks, the null block included, all of it NaN."""
    layers = make_layers(num_layers, num_kv_heads, num_blocks, block_size, head_size, layout, dtype)
    return PagedCache(PagePool.from_layers(layers, packing), layers, packing, layout)


def scrambled_blocks(cache: PagedCache, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return [count] int64 block ids in random order, never the null block."""
    return torch.randperm(cache.num_blocks - 1, generator=generator)[:count] + NULL_BLOCK + 1


def random_kv(
    num_layers: int, num_kv_heads: int, num_tokens: int, head_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V, each [num_layers, num_kv_heads, num_tokens, head_size]."""
    shape = (num_layers, num_kv_heads, num_tokens, head_size)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def pages_of(table: PageTable, req_id: str, num_tokens: int, block_ids: list[int]) -> list[list[list[int]]]:
    """Return page ids [num_layers][num_kv_heads][pages in use] of an evicted request of this many tokens.

    block_ids: its block table
    """
    pages, num_pages = table.rows([req_id], [num_tokens], [torch.tensor(block_ids, dtype=torch.int64)])
    counts, rows = num_pages[0].tolist(), pages[0].tolist()
    return [[row[:count] for row, count in zip(*layer, strict=True)] for layer in zip(rows, counts, strict=True)]
