"""How batches split and fold, and that what is kept from one step to the next is only kept while it holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_kvevict.engine.worker.rows import BatchFolder, EvictedRows

pytestmark = pytest.mark.on_v1

HEADS = 3
CPU = torch.device("cpu")


def batch(query_lens: list[int]) -> Any:
    """What the folder reads of vLLM's metadata: the host's part of it."""
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).to(torch.int32)
    return SimpleNamespace(query_start_loc_cpu=starts, max_query_len=max(query_lens))


def folder(most_decoded: int = 1) -> BatchFolder:
    return BatchFolder(HEADS, most_decoded, CPU)


def slots_of(slots: list[int]) -> np.ndarray:
    return np.array(slots, dtype=np.int32)


def expected_index(rows: list[int], query_lens: list[int]) -> list[int]:
    """The queries of some rows by counting: row, then KV head, then position."""
    index = []
    for row in rows:
        first = sum(query_lens[:row])
        tokens = range(first, first + query_lens[row])
        index += [token * HEADS + head for head in range(HEADS) for token in tokens]
    return index


def check(launch: EvictedRows, rows: list[int], slots: list[int], query_lens: list[int]) -> None:
    assert launch.numbers.tolist() == launch.on_device[0].tolist() == rows
    assert launch.slots.tolist() == launch.on_device[1].tolist() == [slots[row] for row in rows]
    if launch.queries.index is not None:
        assert launch.queries.index.tolist() == expected_index(rows, query_lens)
    per_head = [query_lens[row] for row in rows for _ in range(HEADS)]
    assert launch.queries.query_start_loc.diff().tolist() == per_head
    assert launch.queries.max_query_len == max(per_head)


@pytest.mark.parametrize("slots", [[4, 0, 7], [4, -1, 7], [-1, -1, 2]])
@pytest.mark.parametrize("query_lens", [[1, 1, 1], [3, 1, 2], [1, 17, 1]])
def test_queries_are_sorted_by_row_then_head_then_position(slots: list[int], query_lens: list[int]) -> None:
    split = folder(most_decoded=17).split(slots_of(slots), batch(query_lens))
    evicted, whole = ([row for row, slot in enumerate(slots) if (slot >= 0) == side] for side in (True, False))
    (launch,) = split.evicted
    check(launch, evicted, slots, query_lens)
    # all queries of the batch, sorted already
    assert (launch.queries.index is None) == (not whole and max(query_lens) == 1)
    if not whole:
        assert split.whole is None
        return
    assert split.whole is not None
    assert split.whole.numbers.tolist() == split.whole.numbers_on_device.tolist() == whole
    assert split.whole.query_lens.tolist() == [query_lens[row] for row in whole]
    first = [sum(query_lens[:row]) for row in whole]
    ranges = [range(start, start + query_lens[row]) for start, row in zip(first, whole, strict=True)]
    assert split.whole.tokens.tolist() == [token for tokens in ranges for token in tokens]


@pytest.mark.parametrize("most_decoded", [1, 4])
def test_rows_that_decode_are_a_launch_of_their_own_beside_chunks(most_decoded: int) -> None:
    """A kernel takes as long for each row as for the one with the most queries."""
    slots, query_lens = [4, 0, -1, 7, 5], [1, 300, 500, most_decoded, 70]
    short, long = folder(most_decoded).split(slots_of(slots), batch(query_lens)).evicted
    check(short, [0, 3], slots, query_lens)
    check(long, [1, 4], slots, query_lens)


def test_a_batch_without_evicted_rows_has_no_queries_to_fold() -> None:
    split = folder().split(slots_of([-1, -1]), batch([1, 1]))
    assert not split.evicted
    assert split.whole is None


def test_what_is_known_is_kept_while_the_same_requests_decode_a_token() -> None:
    one, slots = folder(), slots_of([4, -1, 7])
    known = one.split(slots, batch([1, 1, 1]))
    assert one.split(slots, batch([1, 1, 1])) is known
    assert one.split(slots.copy(), batch([1, 1, 1])) is not known


@pytest.mark.parametrize("other", [[2, 1, 1], [1, 1, 0], [1, 5, 1]])
def test_other_query_lengths_are_looked_at_anew(other: list[int]) -> None:
    one, slots = folder(most_decoded=5), slots_of([4, 2, 7])
    known = one.split(slots, batch([1, 1, 1]))
    (launch,) = one.split(slots, batch(other)).evicted
    assert launch.queries.index is not None
    check(launch, [0, 1, 2], [4, 2, 7], other)
    again = one.split(slots, batch([1, 1, 1]))
    assert again is not known
    assert again.evicted[0].queries.index is None
