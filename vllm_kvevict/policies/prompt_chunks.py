"""What a policy that observes all queries sees of several prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.kernels.rotary import Rotary


@dataclass(frozen=True)
class PromptChunks:
    """Chunks of several prompts in one layer. Read only.

    query:       [num_tokens, num_heads, head_size] queries of the chunks, one behind another, RoPE applied
    num_queries: of each prompt, those of its chunk
    kv_lens:     of each prompt, tokens in the cache behind its chunk
    keys:        [num_pages, block_size, head_size] pages to read from, as in ``ScoreInputs``
    read_values: returns values [num_pages, block_size, head_size] likewise
    page_table:  [num_prompts, num_kv_heads, max_pages] int64, logical page -> page id; behind a prompt's last one any
    scale:       softmax scale; stored keys are to be multiplied by ``key_scale`` besides
    key_scale, value_scale: what stored keys and values are to be multiplied by
    rotary:      of the layer, if ``Need.ROTARY``
    softcap:     of logits, as in ``LayerWeights``
    sinks:       [num_heads] float32 likewise; None: there are none
    """

    query: torch.Tensor
    num_queries: Sequence[int]
    kv_lens: Sequence[int]
    keys: torch.Tensor
    read_values: Callable[[], torch.Tensor]
    page_table: torch.Tensor
    scale: float
    key_scale: float = 1.0
    value_scale: float = 1.0
    rotary: Rotary | None = None
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.page_table.shape[1]

    @cached_property
    def first_queries(self) -> list[int]:
        """[num_prompts + 1], where the queries of each prompt begin, and where the last ones end."""
        return [0, *accumulate(self.num_queries)]

    def on_device(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        """Return int64 numbers that the host knows; it does not wait."""
        return to_device(np.array(numbers, dtype=np.int64), self.query.device)
