"""The ring returns the last queries of every request, whatever batches they came in."""

import random

import numpy as np
import torch

from vllm_kvevict.cache.query_ring import QueryRing
from vllm_kvevict.cache.readers import Readers

LAYERS, DEPTH, HEADS, HEAD_SIZE = 2, 8, 3, 4


def query_of(layer: int, req_id: str, position: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer * 1_000_003 + ord(req_id[0]) * 10_007 + position)
    return torch.randn(HEADS, HEAD_SIZE, generator=generator)


def test_last_queries_of_requests_in_changing_batches():
    rng = random.Random(1)
    ring = QueryRing(torch.zeros(LAYERS, 4, DEPTH, HEADS, HEAD_SIZE))
    seq_lens = {"a": 5, "b": 16, "whole": 9}
    ring.slots.take("b")
    ring.slots.take("a")
    for _ in range(60):
        batch = rng.sample(list(seq_lens), rng.randint(1, 3))
        query_lens = [rng.choice([1, 1, 3, DEPTH, DEPTH + 3]) for _ in batch]
        for req_id, query_len in zip(batch, query_lens, strict=True):
            seq_lens[req_id] += query_len
        start_loc = np.cumsum([0, *query_lens], dtype=np.int32)
        where = ring.to_write(batch, start_loc, torch.tensor([seq_lens[req_id] for req_id in batch]))
        assert (where is None) == (batch == ["whole"])
        for layer in range(LAYERS if where is not None else 0):
            queries = [
                query_of(layer, req_id, seq_lens[req_id] - query_len + index)
                for req_id, query_len in zip(batch, query_lens, strict=True)
                for index in range(query_len)
            ]
            ring.write(layer, torch.stack(queries), where)
    slots, num_tokens = torch.tensor([ring.slots["b"], ring.slots["a"]]), torch.tensor([seq_lens["b"], seq_lens["a"]])
    for count in (1, DEPTH):
        for layers in (range(LAYERS), range(1, LAYERS)):
            of_both = ring.last_of(layers, slots, num_tokens, count)
            for row, req_id in enumerate("ba"):
                positions = range(seq_lens[req_id] - count, seq_lens[req_id])
                expected = [query_of(layer, req_id, position) for layer in layers for position in positions]
                assert torch.equal(of_both[row].flatten(0, 1), torch.stack(expected))
    assert ring.last_of(range(LAYERS), slots, num_tokens, 0).shape[:3] == (2, LAYERS, 0)
    assert ring.bytes_per_query == HEADS * HEAD_SIZE * 4
    assert ring.num_bytes == LAYERS * 4 * DEPTH * HEADS * HEAD_SIZE * 4


def test_nothing_is_kept_for_requests_without_a_slot():
    ring = QueryRing(torch.zeros(LAYERS, 4, DEPTH, HEADS, HEAD_SIZE))
    assert ring.to_write(["a"], np.array([0, 1]), torch.tensor([7])) is None


def test_queries_of_layers_that_share_pages_come_together():
    """Layer 1 is read by three, two of which have no pages; its two KV heads have twice as many neighbours each."""
    readers = Readers(["a", "b", "c"], {"d": "b", "e": "b"}, num_kv_heads=2)
    ring = QueryRing(torch.zeros(readers.num, 2, DEPTH, 4, HEAD_SIZE), readers)
    ring.slots.take("x")
    where = ring.to_write(["x"], np.array([0, DEPTH]), torch.tensor([DEPTH]))
    queries = torch.randn(readers.num, DEPTH, 4, HEAD_SIZE)
    for number in range(readers.num):
        ring.write(number, queries[number], where)
    slots, num_tokens = torch.tensor([ring.slots["x"]]), torch.tensor([DEPTH])
    assert [*readers.stretches()] == [range(1), range(1, 2), range(2, 3)]
    for layers in readers.stretches():
        (found,) = ring.last_of(layers, slots, num_tokens, 3)
        of_readers = queries[readers.numbers[layers[0]], -3:].unflatten(2, (2, 2))
        expected = [of_readers[:, :, head].transpose(0, 1).flatten(1, 2) for head in range(2)]
        assert torch.equal(found[0], torch.cat(expected, dim=1))
