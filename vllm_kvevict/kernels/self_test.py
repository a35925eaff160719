"""Tries every kernel on a device against its definition in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vllm_kvevict.kernels.chunk_attention import chunk_attention, chunk_attention_reference
from vllm_kvevict.kernels.chunk_batch import ChunkBatch
from vllm_kvevict.kernels.expand_page_table import (
    BatchRows,
    LayerPages,
    PageLists,
    expand_page_table,
    expand_page_table_reference,
)
from vllm_kvevict.kernels.leverage import leverage, leverage_reference
from vllm_kvevict.kernels.move_tokens import move_tokens, move_tokens_reference
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.kernels.select import count_best, count_best_reference, select, select_reference
from vllm_kvevict.kernels.slot_scores import SlotBatch, slot_scores, slot_scores_reference
from vllm_kvevict.kernels.streaming_sums import streaming_sums, streaming_sums_reference
from vllm_kvevict.kernels.window_batch import Reduction, WindowBatch
from vllm_kvevict.kernels.window_scores import window_scores, window_scores_reference

HEADS, BLOCK_SIZE = 2, 16
RELATIVE, ABSOLUTE = 1e-3, 1e-5  # of the same products, added up in another order


class Example(NamedTuple):
    """A kernel, its definition, and arguments for either, which it may change."""

    function: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: tuple[Any, ...]


def examples(
    device: torch.device, dtype: torch.dtype, num_tokens: int = 700, head_size: int = 64
) -> dict[str, Example]:
    """Return an example of each kernel by its name, the same in every call.

    dtype: of queries, keys and values
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, of)

    def whole(values: Any, of: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.as_tensor(values, dtype=of).to(device)

    num_pages = -(-num_tokens // BLOCK_SIZE)
    keys, values = (normal(HEADS * num_pages + 3, BLOCK_SIZE, head_size) for _ in range(2))
    table = whole(torch.randperm(len(keys), generator=generator)[: HEADS * num_pages]).view(1, HEADS, num_pages)
    query, scale = normal(8, 2 * HEADS, head_size), head_size**-0.5
    window = WindowBatch(query[None], keys, values, table, whole([num_tokens]), num_tokens, scale)
    chunks = ChunkBatch(query, keys, table, whole([0, 8]), whole([0, num_tokens]), 8, num_tokens, scale)
    positions = whole(torch.stack([torch.randperm(num_pages * BLOCK_SIZE, generator=generator) for _ in range(HEADS)]))
    slots = SlotBatch(query[None], keys, table, positions[None], whole([[num_tokens - 9] * 8]), scale)
    angles = torch.arange(num_tokens)[:, None] * torch.tensor([1.0, 0.1])
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=1).to(device), True)
    blocks = whole([[0, 5, num_tokens], [0, 0, num_tokens - 5]])  # as long as the result is wide: all of it is compared
    sketch = normal(head_size, 8, of=torch.float64)
    scores, one = torch.rand(3, 2, num_tokens, generator=generator).to(device), whole([1], torch.int32)
    counts, starts = whole([[[2, 2], [2, 2]]] * 3, torch.int32), whole([[[0, 2], [4, 6]]] * 3, torch.int32)
    lists = PageLists(
        torch.arange(40, dtype=torch.int32, device=device), one.repeat(3, 2), starts, counts, one.repeat(3) * 32
    )
    rows, pages = BatchRows(one - 1, one, one * 50, one.repeat(1, 8) * 7), LayerPages(1, whole([100]), 90, BLOCK_SIZE)
    found = torch.zeros(1, 2, 8, dtype=torch.int32, device=device), one.repeat(1, 2)
    of_chunk = whole([[0, 5, 0, 8]])
    return {
        "window_scores": Example(
            window_scores, window_scores_reference, (window, Reduction("max", "max", 3, "value_norm"))
        ),
        "slot_scores": Example(slot_scores, slot_scores_reference, (slots, "max", "sum")),
        "streaming_sums": Example(
            streaming_sums, streaming_sums_reference, (chunks, torch.zeros(HEADS, num_tokens, device=device))
        ),
        "chunk_attention": Example(
            chunk_attention, chunk_attention_reference, (query, keys, table, of_chunk, 8, scale, "mean")
        ),
        "leverage": Example(leverage, leverage_reference, (keys, table, blocks, num_tokens - 5, rotary, sketch, 0.5)),
        "select": Example(select, select_reference, (scores, whole([[1, 9], [num_tokens, 0], [3, 4]]), 2, 5)),
        "count_best": Example(count_best, count_best_reference, (scores, whole([1, 9, 99]))),
        "move_tokens": Example(move_tokens, move_tokens_reference, (keys, values, whole([3, 4]), whole([40, 41]))),
        "expand_page_table": Example(expand_page_table, expand_page_table_reference, (lists, rows, pages, *found)),
    }


def compare(example: Example) -> None:
    """Raise AssertionError unless a kernel returns what its definition does, and leaves its arguments as that does."""
    ours, theirs = copy.deepcopy(example.arguments), copy.deepcopy(example.arguments)
    results = example.function(*ours), example.reference(*theirs)
    torch.testing.assert_close(*results, rtol=RELATIVE, atol=ABSOLUTE)
    for one, other in zip(flat(ours), flat(theirs), strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=RELATIVE, atol=ABSOLUTE)


def flat(arguments: tuple[Any, ...]) -> list[Any]:
    """Return arguments with the fields of each group in its place, as the operators take them."""
    values: list[Any] = []
    for argument in arguments:
        if isinstance(argument, PageLists | BatchRows | LayerPages):
            values += list(argument)
        elif isinstance(argument, ChunkBatch | SlotBatch | WindowBatch | Reduction | Rotary):
            values += list(vars(argument).values())
        else:
            values.append(argument)
    return values
