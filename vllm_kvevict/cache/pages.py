"""The page pool: one allocation of vLLM seen as pages of one KV head each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch

from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.kernels.move_tokens import move_tokens
from vllm_kvevict.kernels.paged import ELEMENT_VIEWS
from vllm_kvevict.kernels.tiled_tokens import gather_tiled_tokens, move_tiled_tokens

Packing = Literal["transposed", "interleaved", "tiled"]


@dataclass(frozen=True)
class BlockPages:
    """The pages of some requests' blocks in all layers and heads, computed when they are asked for: there are many.

    first_pages: [num_layers, num_kv_heads] int64, pages of block 0
    to_blocks:   [num_reqs, max_blocks] int64, page ids from block 0 to each block
    """

    first_pages: torch.Tensor
    to_blocks: torch.Tensor

    def of_layer(self, layer: int) -> torch.Tensor:
        """Return [num_reqs, num_kv_heads, max_blocks] int64 of one layer."""
        return self.first_pages[layer][:, None] + self.to_blocks[:, None]

    def of_heads(self, heads: slice) -> torch.Tensor:
        """Return [num_reqs, num_heads, max_blocks] int64 of some heads, counted through all layers."""
        return self.first_pages.flatten()[heads, None] + self.to_blocks[:, None]

    def at(self, req: torch.Tensor, head: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Return [num_places] int64, the page of each of these; heads are counted through all layers."""
        return self.first_pages.flatten()[head] + self.to_blocks[req, block]

    def only(self, req: int, num_blocks: int) -> BlockPages:
        """Return those of the first blocks of one request."""
        return BlockPages(self.first_pages, self.to_blocks[req : req + 1, :num_blocks])


@dataclass(frozen=True)
class PagePool:
    """Every page of a cache group, and where the page of (layer, block, KV head) lies.

    pages:        [num_pages, page_elements] the whole allocation, one row a page
    keys:         [num_pages, block_size, head_size] strided view: hides how a platform packs a page. If ``is_tiled``
                  no strides can, and it is for the methods of this class only
    values:       [num_pages, block_size, head_size] likewise
    layer_offset: [num_layers] int64, page id of (layer, block 0, head 0)
    block_stride: page ids from one block to the next
    num_kv_heads: heads of one block lie in consecutive pages
    is_tiled:     whether pages are those of kernels/tiled_tokens.py
    """

    pages: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    layer_offset: torch.Tensor
    block_stride: int
    num_kv_heads: int
    is_tiled: bool = False

    @property
    def block_size(self) -> int:
        return self.keys.shape[1]

    @property
    def head_size(self) -> int:
        return self.keys.shape[2]

    @property
    def num_layers(self) -> int:
        return self.layer_offset.shape[0]

    def page_ids(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Return [num_layers, num_kv_heads, *block_ids.shape] int64, the pages of these blocks."""
        first, blocks = self._first_pages(), block_ids.to(torch.int64) * self.block_stride
        return first.reshape(*first.shape, *[1] * block_ids.ndim) + blocks

    def pages_of(self, block_ids: torch.Tensor) -> BlockPages:
        """Return the pages of the blocks [num_reqs, max_blocks] int64 of some requests."""
        return BlockPages(self._first_pages(), block_ids * self.block_stride)

    def pages_of_each(self, block_ids: Sequence[torch.Tensor]) -> BlockPages:
        """Return the pages of the blocks [num_blocks] int64 of each request; behind the last one those of the null
        block.
        """
        if len(block_ids) == 1:
            return self.pages_of(block_ids[0][None])
        ends = list(accumulate(map(len, block_ids)))
        width, null = max(map(len, block_ids)), ends[-1]
        index = [
            [*range(end - len(ids), end), *[null] * (width - len(ids))]
            for ids, end in zip(block_ids, ends, strict=True)
        ]
        together = torch.cat([*block_ids, block_ids[0].new_zeros(1)])
        return self.pages_of(together[to_device(np.array(index, dtype=np.int64), together.device)])

    def _first_pages(self) -> torch.Tensor:
        """Return [num_layers, num_kv_heads] int64, the pages of block 0."""
        return self.layer_offset[:, None] + torch.arange(self.num_kv_heads, device=self.layer_offset.device)

    def layer_page_ids(self, layer: int, block_ids: torch.Tensor) -> torch.Tensor:
        """Return [num_kv_heads, *block_ids.shape] int64, the pages of these blocks in one layer."""
        heads = torch.arange(self.num_kv_heads, device=self.layer_offset.device)
        first = self.layer_offset[layer] + heads
        return first.reshape(-1, *[1] * block_ids.ndim) + block_ids.to(torch.int64) * self.block_stride

    def readable(self, page_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys and values [*, block_size, head_size] to read these pages from, and their ids there.

        Of the pool itself; of a copy of the pages, if they are tiled.
        """
        if not self.is_tiled:
            return self.keys, self.values, page_ids
        lane = torch.arange(self.block_size, device=page_ids.device)
        kv = gather_tiled_tokens(self.keys, self.values, page_ids[..., None] * self.block_size + lane)
        keys, values = (part.flatten(0, -3) for part in kv)
        return keys, values, torch.arange(len(keys), device=page_ids.device).view(page_ids.shape)

    def in_order(self, slots: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor], torch.Tensor]:
        """Return keys, and a function that returns values, [*, tokens, head_size] to read the tokens of these slots
        from, in this order, and page ids [..., num_pages] there.

        Of the pool itself, a page being one token, where all tokens lie at one distance; else of a copy in pages of
        ``block_size`` tokens, that of the values made when they are asked for.

        slots: [..., num_slots] int64, whole pages of them
        """
        parts = (self.keys, self.values)
        if not self.is_tiled and all(part.stride(0) == self.block_size * part.stride(1) for part in parts):
            keys, values = (part.flatten(0, 1)[:, None] for part in parts)
            return keys, lambda: values, slots
        page_ids = torch.arange(slots.numel() // self.block_size, device=slots.device).view(*slots.shape[:-1], -1)
        if self.is_tiled:
            keys, values = (self._in_pages(part) for part in self.gather(slots))
            return keys, lambda: values, page_ids
        keys = self._in_pages(_gather_tokens(self.keys, slots))
        return keys, lambda: self._in_pages(_gather_tokens(self.values, slots)), page_ids

    def _in_pages(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [*, block_size, head_size] of [..., num_tokens, head_size]."""
        return tokens.reshape(-1, self.block_size, tokens.shape[-1])

    def gather(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V [*slots.shape, head_size], a copy of what these slots hold, as it is stored.

        slots: [...] int64, page_id * block_size + offset
        """
        if self.is_tiled:
            return gather_tiled_tokens(self.keys, self.values, slots)
        return _gather_tokens(self.keys, slots), _gather_tokens(self.values, slots)

    def move(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """In place: copy tokens from slots to slots, as ``move_tokens`` has it."""
        (move_tiled_tokens if self.is_tiled else move_tokens)(self.keys, self.values, source, destination)

    @classmethod
    def from_layers(cls, kv_caches: list[torch.Tensor], packing: Packing) -> PagePool:
        """See the caches of all layers of one group as one pool.

        kv_caches: per layer [num_blocks, num_kv_heads, block_size, 2 * head_size], views of one allocation
        packing:   what a page holds. "transposed": K as [head_size, block_size], then V as [block_size, head_size]
                   (vLLM's CPU attention); "interleaved": K and V side by side in every slot (FlashAttention); "tiled":
                   K, then V, each as kernels/tiled_tokens.py describes (vLLM's CPU attention with AMX)

        Raises ValueError if the layers do not share one allocation, or a page is not contiguous or not aligned.
        """
        first = kv_caches[0]
        num_blocks, num_kv_heads, block_size, content = first.shape
        page_elements = block_size * content
        for cache in kv_caches:
            _check_layer(cache, first, page_elements)
        storage = first.untyped_storage()
        num_pages = storage.nbytes() // first.element_size() // page_elements
        pages = first.new_empty(0).set_(storage, 0, (num_pages, page_elements), (page_elements, 1))
        keys, values = _split(pages, packing, block_size, content // 2)
        offsets = [cache.storage_offset() // page_elements for cache in kv_caches]
        return cls(
            pages,
            keys,
            values,
            torch.tensor(offsets, dtype=torch.int64, device=first.device),
            first.stride(0) // page_elements if num_blocks > 1 else num_kv_heads,
            num_kv_heads,
            packing == "tiled",
        )


def _gather_tokens(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    block_size = pages.shape[1]
    elements = pages.view(ELEMENT_VIEWS[pages.element_size()])  # indexing is not defined for every 8-bit float
    return elements[slots // block_size, slots % block_size].view(pages.dtype)


def _check_layer(cache: torch.Tensor, first: torch.Tensor, page_elements: int) -> None:
    if cache.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
        raise ValueError("kv_caches: expected all layers in one allocation, got several")
    expected = (first.stride(0), page_elements, first.shape[3], 1)
    if cache.shape != first.shape or cache.stride() != expected:
        raise ValueError(
            f"kv_caches: expected pages of shape {tuple(first.shape)} with strides {expected}, "
            f"got {tuple(cache.shape)} with {cache.stride()}"
        )
    if cache.storage_offset() % page_elements or cache.stride(0) % page_elements:
        raise ValueError(f"kv_caches: expected layers and blocks to start at multiples of a page ({page_elements})")


def _split(pages: torch.Tensor, packing: Packing, block_size: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    if packing == "transposed":
        half = block_size * head_size
        keys = pages[:, :half].unflatten(1, (head_size, block_size)).transpose(1, 2)
        return keys, pages[:, half:].unflatten(1, (block_size, head_size))
    if packing == "tiled":
        keys, values = pages.unflatten(1, (2, block_size, head_size)).unbind(1)
        return keys, values
    if packing == "interleaved":
        slots = pages.unflatten(1, (block_size, 2 * head_size))
        return slots[:, :, :head_size], slots[:, :, head_size:]
    raise ValueError(f"packing: expected 'transposed', 'interleaved' or 'tiled', got {packing!r}")
