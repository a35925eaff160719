"""What a policy sees of one layer, and the one method it must write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from vllm_kvevict.registry import Registry


@dataclass(frozen=True)
class ScoreInputs:
    """One layer of one request at the end of its prefill. Read only.

    query:      [window, num_heads, head_size] the last ``window`` queries of the prompt, RoPE applied
    keys:       [num_pages, block_size, head_size] a view of the whole page pool, RoPE applied
    values:     [num_pages, block_size, head_size] likewise
    page_table: [num_kv_heads, num_prompt_blocks] int64, logical page -> page id
    kv_len:     tokens of the prompt; slots of the last page past it hold garbage
    scale:      softmax scale
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    page_table: torch.Tensor
    kv_len: int
    scale: float


class EvictionPolicy(ABC):
    """Ranks cached tokens. It does not decide how many stay, and it moves nothing.

    Subclasses are frozen dataclasses: their fields are the options that a user may set.
    """

    @property
    def query_window(self) -> int:
        """Last queries of the prompt that the engine must hold for ``score``."""
        return 0

    @property
    def num_sink(self) -> int:
        """Tokens at the start of the prompt that the published method always keeps."""
        return 0

    @property
    def num_recent(self) -> int:
        """Tokens at the end of the prompt that the published method always keeps."""
        return 0

    @property
    def default_allocator(self) -> str:
        """Allocator of the published method."""
        return "uniform"

    @abstractmethod
    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return [num_kv_heads, kv_len] float32 scores; the highest stay. Protection is not the scorer's business."""


POLICIES: Registry[EvictionPolicy] = Registry(
    "eviction policy",
    EvictionPolicy,  # type: ignore[type-abstract]
    "vllm_kvevict.policies",
)
