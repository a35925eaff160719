"""Each kernel is an operator of torch that says truly what it changes and returns, and torch.compile keeps to it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.implementations import scrambled_keys
from vllm_kvevict.kernels.chunk_attention import chunk_attention
from vllm_kvevict.kernels.chunk_batch import ChunkBatch
from vllm_kvevict.kernels.expand_page_table import BatchRows, LayerPages, PageLists, expand_page_table
from vllm_kvevict.kernels.leverage import leverage
from vllm_kvevict.kernels.move_tokens import move_tokens
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.kernels.select import count_best, select
from vllm_kvevict.kernels.slot_scores import SlotBatch, slot_scores
from vllm_kvevict.kernels.streaming_sums import streaming_sums
from vllm_kvevict.kernels.window_batch import Reduction, WindowBatch
from vllm_kvevict.kernels.window_scores import window_scores

HEADS, HEAD_SIZE, BLOCK_SIZE, TOKENS = 2, 16, 16, 70


def cases() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Each kernel's function and arguments for it, the same in every call."""
    torch.manual_seed(0)
    keys, table, _ = scrambled_keys(HEADS, range(TOKENS), BLOCK_SIZE, HEAD_SIZE)
    keys, table = keys.nan_to_num(), table[:, : -(-TOKENS // BLOCK_SIZE)].clone()  # opcheck compares what is unused too
    query, scale = torch.randn(8, 2 * HEADS, HEAD_SIZE), HEAD_SIZE**-0.5
    batch = WindowBatch(query[None], keys, keys.clone(), table[None], torch.tensor([TOKENS]), TOKENS, scale)
    chunks = ChunkBatch(query, keys, table[None], torch.tensor([0, 8]), torch.tensor([0, TOKENS]), 8, TOKENS, scale)
    positions = torch.randperm(HEADS * table.numel() * BLOCK_SIZE)[: table.numel() * BLOCK_SIZE].view(1, HEADS, -1)
    slots = SlotBatch(query[None], keys, table[None], positions, torch.full((1, 8), 90), scale)
    angles = torch.arange(TOKENS)[:, None] * torch.tensor([1.0, 0.1])
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=1), True)
    sketch = torch.randn(HEAD_SIZE, 8).double()
    scores, one = torch.rand(3, 2, TOKENS), torch.ones(1, dtype=torch.int32)
    counts = torch.full((3, 2, 2), 2, dtype=torch.int32)
    starts = torch.arange(0, 8, 2, dtype=torch.int32).view(1, 2, 2).repeat(3, 1, 1)
    lists = PageLists(torch.arange(40, dtype=torch.int32), one.repeat(3, 2), starts, counts, one.repeat(3) * 32)
    rows = BatchRows(one - 1, one, one * 50, one.repeat(1, 8) * 7)
    return {
        "window_scores": (window_scores, (batch, Reduction("max", "max", 3, "value_norm"))),
        "slot_scores": (slot_scores, (slots, "max", "sum")),
        "streaming_sums": (streaming_sums, (chunks, torch.zeros(HEADS, TOKENS))),
        "chunk_attention": (
            chunk_attention,
            (query, keys, table[None], torch.tensor([[0, 5, 0, 8]]), 8, scale, "mean"),
        ),
        # as long as the result is wide: numbers behind a block are compared too
        "leverage": (
            leverage,
            (keys, table[None], torch.tensor([[0, 5, TOKENS], [0, 0, TOKENS - 5]]), TOKENS - 5, rotary, sketch, 0.5),
        ),
        "select": (select, (scores, torch.tensor([[1, 9], [70, 0], [3, 4]]), 2, 5)),
        "count_best": (count_best, (scores, torch.tensor([1, 9, 99]))),
        "move_tokens": (move_tokens, (keys, keys.clone(), torch.tensor([3, 4]), torch.tensor([40, 41]))),
        "expand_page_table": (
            expand_page_table,
            (lists, rows, LayerPages(1, one.long() * 100, 90, 16), torch.zeros(1, 2, 8).int(), one.repeat(1, 2)),
        ),
    }


def flat(arguments: tuple[Any, ...]) -> list[Any]:
    values: list[Any] = []
    for argument in arguments:
        is_group = isinstance(argument, ChunkBatch | SlotBatch | WindowBatch | Reduction | Rotary)
        if is_group:
            values += list(vars(argument).values())
        else:
            values += list(argument) if isinstance(argument, PageLists | BatchRows | LayerPages) else [argument]
    return values


@pytest.mark.parametrize("name", cases())
def test_the_operator_does_what_its_schema_says(name):
    _, arguments = cases()[name]
    operator = getattr(torch.ops.kvevict, name).default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    assert set(torch.library.opcheck(operator, tuple(flat(arguments)), test_utils=checks).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", cases())
def test_compiled_code_computes_and_changes_the_same(name):
    function, expected_arguments = cases()[name]
    _, actual_arguments = cases()[name]
    expected = function(*expected_arguments)
    torch.compiler.reset()  # all cases share one lambda, which is not compiled any number of times
    actual = torch.compile(lambda *values: function(*values), fullgraph=True, backend="aot_eager")(*actual_arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for one, other in zip(flat(actual_arguments), flat(expected_arguments), strict=True):
        assert not isinstance(one, torch.Tensor) or one.equal(other)


def test_compiled_code_reads_what_was_moved():
    """A read after the move must not be taken for one before it."""

    def move_and_read(keys, values, source, destination):
        before = keys[1, 3].clone()
        move_tokens(keys, values, source, destination)
        return before, keys[1, 3] + 0

    keys, values = torch.randn(2, 2, 16, 8).unbind(0)
    moved, old = keys[0, 5].clone(), keys[1, 3].clone()
    compiled = torch.compile(move_and_read, fullgraph=True, backend="aot_eager")
    before, after = compiled(keys, values, torch.tensor([5]), torch.tensor([19]))
    assert before.equal(old)
    assert after.equal(moved)
    assert keys[1, 3].equal(moved)


def test_errors_are_those_of_the_function():
    with pytest.raises(ValueError, match=r"`keys`: expected .num_pages, block_size, head_size"):
        torch.ops.kvevict.move_tokens(torch.zeros(3), torch.zeros(3), torch.tensor([1]), torch.tensor([2]))
