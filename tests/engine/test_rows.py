"""How batches split and fold, and that what is kept from one step to the next is only kept while it holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_kvevict.engine.worker.rows import BatchFolder

HEADS = 3


def batch(query_lens: list[int]) -> Any:
    """What the folder reads of vLLM's metadata."""
    lens = torch.tensor(query_lens, dtype=torch.int32)
    starts = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).to(torch.int32)
    return SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        max_query_len=max(query_lens),
        naive_query_lens=lambda: lens,
    )


def expected_index(slots: list[int], query_lens: list[int]) -> list[int]:
    """The evicted rows' queries by counting: row, then KV head, then position."""
    first, index = 0, []
    for slot, query_len in zip(slots, query_lens, strict=True):
        tokens = range(first, first + query_len)
        index += [token * HEADS + head for head in range(HEADS) for token in tokens if slot >= 0]
        first += query_len
    return index


@pytest.mark.parametrize("slots", [[4, 0, 7], [4, -1, 7], [-1, -1, 2]])
@pytest.mark.parametrize("query_lens", [[1, 1, 1], [3, 1, 2], [1, 17, 1]])
def test_queries_are_sorted_by_row_then_head_then_position(slots: list[int], query_lens: list[int]) -> None:
    split, queries = BatchFolder(HEADS).split(torch.tensor(slots), batch(query_lens))
    assert queries is not None
    expected = expected_index(slots, query_lens)
    if min(slots) >= 0 and max(query_lens) == 1:
        assert queries.index is None
        assert expected == list(range(len(expected)))
    else:
        assert queries.index is not None
        assert queries.index.tolist() == expected
    of_evicted = [length for slot, length in zip(slots, query_lens, strict=True) if slot >= 0]
    assert queries.query_lens.tolist() == of_evicted
    per_head = [length for length in of_evicted for _ in range(HEADS)]
    assert queries.query_start_loc.diff().tolist() == per_head
    assert split.evicted.tolist() == [row for row, slot in enumerate(slots) if slot >= 0]
    assert split.whole.tolist() == [row for row, slot in enumerate(slots) if slot < 0]


def test_a_batch_without_evicted_rows_has_no_queries_to_fold() -> None:
    split, queries = BatchFolder(HEADS).split(torch.tensor([-1, -1]), batch([1, 1]))
    assert queries is None
    assert split.whole_tokens is None


def test_what_is_known_is_kept_while_the_same_requests_decode_a_token() -> None:
    folder, slots = BatchFolder(HEADS), torch.tensor([4, -1, 7])
    known = folder.split(slots, batch([1, 1, 1]))
    assert folder.split(slots, batch([1, 1, 1])) is known
    assert folder.split(slots.clone(), batch([1, 1, 1])) is not known


@pytest.mark.parametrize("other", [[2, 1, 1], [1, 1, 0], [1, 5, 1]])
def test_other_query_lengths_are_looked_at_anew(other: list[int]) -> None:
    folder, slots = BatchFolder(HEADS), torch.tensor([4, 2, 7])
    known = folder.split(slots, batch([1, 1, 1]))
    _, queries = folder.split(slots, batch(other))
    assert queries is not None
    assert queries.index is not None
    assert queries.index.tolist() == expected_index([4, 2, 7], other)
    again = folder.split(slots, batch([1, 1, 1]))
    assert again is not known
    assert again[1] is not None
    assert again[1].index is None
