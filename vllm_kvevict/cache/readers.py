"""Layers that read the same pages: the one that writes them, and those that share its keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Reader:
    """A layer of the model that attends over the pages of a layer of the pool, its own or another's.

    layer:   of the pool
    number:  its own among all readers: first the layers of the pool, then those that share
    writes:  whether the pages are its own
    is_last: whether no other reader of these pages runs behind it
    """

    layer: int
    number: int
    writes: bool
    is_last: bool


class Readers:
    """Who reads the pages of each layer of a pool.

    A token stays for all of them or for none. So policies see their queries together, as those of one layer whose KV
    heads have as many more query heads.

    numbers: of each layer, those of its readers in the order in which they run, the one that writes first
    num:     how many there are in all
    """

    def __init__(self, layer_names: Sequence[str], targets: Mapping[str, str], num_kv_heads: int) -> None:
        """targets: of each layer without pages, the one whose pages it reads; in the order in which they run"""
        self._num_kv_heads = num_kv_heads
        self.num = len(layer_names) + len(targets)
        self.numbers = [[layer] for layer in range(len(layer_names))]
        layer_of = {name: layer for layer, name in enumerate(layer_names)}
        for number, target in enumerate(targets.values(), len(layer_names)):
            self.numbers[layer_of[target]].append(number)
        layer_of |= {name: layer_of[target] for name, target in targets.items()}
        self._named = {
            name: Reader(layer, number, number < len(layer_names), number == self.numbers[layer][-1])
            for number, (name, layer) in enumerate(layer_of.items())
        }

    @classmethod
    def of_own_pages(cls, num_layers: int) -> Readers:
        """Return those of a pool of which each layer reads its own pages only."""
        return cls([str(layer) for layer in range(num_layers)], {}, 1)

    def __getitem__(self, name: str) -> Reader:
        return self._named[name]

    @property
    def layer_index(self) -> dict[str, int]:
        """Of each reader, by its name, the layer of the pool that it reads."""
        return {name: reader.layer for name, reader in self._named.items()}

    @property
    def counts(self) -> list[int]:
        """How many read the pages of each layer."""
        return [len(numbers) for numbers in self.numbers]

    def all_of(self, layer: int) -> Reader:
        """Return what stands for all readers of a layer together."""
        return Reader(layer, layer, writes=True, is_last=True)

    def stretches(self) -> Iterator[range]:
        """Yield layers next to each other that have equally many readers, and so can be seen together."""
        counts, first = self.counts, 0
        for end in range(1, len(counts) + 1):
            if end == len(counts) or counts[end] != counts[first]:
                yield range(first, end)
                first = end

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return [*, len(parts) * num_heads, head_size], the heads of all readers of a layer: those of one KV head are
        neighbours, in the order of the readers.

        parts: [*, num_heads, head_size] of each reader
        """
        if len(parts) == 1:
            return parts[0]
        together: torch.Tensor = torch.cat([part.unflatten(-2, (self._num_kv_heads, -1)) for part in parts], dim=-2)
        return together.flatten(-3, -2)
