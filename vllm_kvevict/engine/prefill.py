"""What a worker gathers while the chunks of a prompt pass: the last queries, and the scores once the prompt ends."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvevict.evictor import Eviction


class QueryWindow:
    """The last queries of one request in every layer, gathered over chunks of any size."""

    def __init__(self, num_layers: int, window: int) -> None:
        self._window = window
        self._queries: list[torch.Tensor | None] = [None] * num_layers

    def extend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Append a chunk [num_tokens, num_heads, head_size]; return the last ``window`` queries so far."""
        earlier = self._queries[layer]
        last = query if earlier is None else torch.cat([earlier, query[max(len(query) - self._window, 0) :]])
        # a copy: the engine reuses its query buffer in the next step
        last = self._queries[layer] = last[max(len(last) - self._window, 0) :].clone()
        return last


@dataclass
class PrefillRow:
    """One row of a batch: a chunk of a prompt that will be evicted.

    start, end: its tokens in the batch
    eviction:   set if the chunk is the last one
    """

    start: int
    end: int
    queries: QueryWindow
    eviction: Eviction | None

    def observe(self, layer: int, query: torch.Tensor, scale: float) -> None:
        """See a layer's queries [num_tokens, num_heads, head_size] of the whole batch, after its attention ran."""
        window = self.queries.extend(layer, query[self.start : self.end])
        if self.eviction is not None:
            self.eviction.score_layer(layer, window, scale)
