"""One eviction as numbers: what was scored, what stayed, what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vllm_kvevict.cache.compaction import Compaction
from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.eviction.observer import Choice, EvictionObserver, observed_by
from vllm_kvevict.eviction.traits import traits_of


@dataclass(frozen=True)
class RecordedEviction:
    """What one ``Eviction`` saw and decided.

    scores:     [num_layers, num_kv_heads, num_tokens] float32, the policy's scores before protection
    kept:       [num_layers, num_kv_heads, num_tokens] bool
    num_pages:  [num_layers, num_kv_heads] int64, pages in use after the eviction, the partly filled one included
    num_first:  tokens at the start that do not compete: they stay whatever their score
    num_last:   tokens at the end that do not compete: they stay, or the policy looks through their eyes
    page_bytes: size of the page of one layer, block and KV head
    seconds:    score + allocate + select + compact
    """

    scores: torch.Tensor
    kept: torch.Tensor
    num_pages: torch.Tensor
    plan: EvictionPlan
    num_first: int
    num_last: int
    page_bytes: int
    seconds: float

    @property
    def kept_tokens(self) -> torch.Tensor:
        """[num_layers, num_kv_heads] int64, prompt tokens kept."""
        return self.kept.sum(dim=-1)

    @property
    def bytes_saved(self) -> int:
        """Memory of the blocks that went back to vLLM's pool."""
        return self.plan.first_kept_block * self.num_pages.numel() * self.page_bytes

    def score_shares(self) -> torch.Tensor:
        """Return [num_layers] float64, the share of the competing tokens' score that stays in each layer.

        NaN for a layer whose scores are no masses: negative, or all zero.
        """
        scores = torch.nan_to_num(self._competing(self.scores).to(torch.float64), nan=0.0, neginf=0.0)
        kept = (scores * self._competing(self.kept)).sum(dim=(1, 2))
        shares = kept / scores.sum(dim=(1, 2))
        return shares.masked_fill((scores < 0).flatten(1).any(dim=1), float("nan"))

    def token_shares(self) -> torch.Tensor:
        """Return [num_layers] float64, the share of the competing tokens that stays in each layer."""
        return self._competing(self.kept).to(torch.float64).mean(dim=(1, 2))

    def _competing(self, values: torch.Tensor) -> torch.Tensor:
        return values[..., self.num_first : max(values.shape[-1] - self.num_last, self.num_first)]


@dataclass(frozen=True)
class Inspection:
    """One prompt through the engine: its eviction, the answer, and the names of what produced them.

    budget: tokens per layer and KV head (int), or fraction of the prompt (float), as the user gave it; or "auto"
    answer: text, or token ids where the model has no tokenizer
    """

    record: RecordedEviction
    model: str
    policy: str
    allocator: str
    budget: int | float | str
    answer: str


@contextmanager
def recorded_evictions() -> Iterator[list[RecordedEviction]]:
    """Note every first eviction that ends in this process while the context is open, in order."""
    recorder = _Recorder()
    with observed_by(recorder):
        yield recorder.records


class _Recorder(EvictionObserver):
    def __init__(self) -> None:
        self.records: list[RecordedEviction] = []

    def compacted(self, choice: Choice, compaction: Compaction, seconds: float) -> None:
        method, pages = choice.method, choice.pool.pages
        record = RecordedEviction(
            choice.scores.cpu(),
            choice.kept.cpu(),
            compaction.num_pages.cpu(),
            choice.plan,
            num_first=method.num_sink,
            num_last=max(method.num_recent, traits_of(method.policy).num_recent),
            page_bytes=pages.shape[1] * pages.element_size(),
            seconds=seconds,
        )
        self.records.append(record)
