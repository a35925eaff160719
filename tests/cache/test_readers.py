"""Who reads the pages of which layer, and how their queries stand beside each other."""

import torch

from vllm_kvevict.cache.readers import Reader, Readers

NAMES, TARGETS = ["a", "b"], {"c": "b", "d": "a", "e": "b"}


def test_each_reader_knows_its_layer_and_whether_others_follow():
    readers = Readers(NAMES, TARGETS, num_kv_heads=1)
    assert (readers.num, readers.numbers, readers.counts) == (5, [[0, 3], [1, 2, 4]], [2, 3])
    assert readers.layer_index == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 1}
    assert [readers[name] for name in "abcde"] == [
        Reader(0, 0, writes=True, is_last=False),
        Reader(1, 1, writes=True, is_last=False),
        Reader(1, 2, writes=False, is_last=False),
        Reader(0, 3, writes=False, is_last=True),
        Reader(1, 4, writes=False, is_last=True),
    ]


def test_layers_of_their_own_stand_together():
    readers = Readers.of_own_pages(3)
    assert [*readers.stretches()] == [range(3)]
    assert readers["1"] == readers.all_of(1) == Reader(1, 1, writes=True, is_last=True)
    query = torch.randn(4, 6, 8)
    assert readers.joined([query]) is query


def test_heads_of_one_kv_head_become_neighbours():
    readers = Readers(NAMES, TARGETS, num_kv_heads=2)
    query = torch.arange(2 * 4).view(2, 1, 4, 1)  # two readers, a token, two heads for each KV head
    assert readers.joined([*query]).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
