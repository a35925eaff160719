"""What a policy sees of several requests at once, and whether it can score them so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from vllm_kvevict.kernels.slot_scores import Fusion, Group, SlotBatch, slot_scores
from vllm_kvevict.kernels.window_batch import Reduction, WindowBatch
from vllm_kvevict.kernels.window_scores import window_scores
from vllm_kvevict.policies import scratch

if TYPE_CHECKING:
    from vllm_kvevict.policies.base import LayerWeights

_TILE = 1024  # tokens
_WAYS_TO_SCORE = ("score", "score_layers", "score_batch")


@dataclass(frozen=True)
class ScoreBatch:
    """Some layers of several requests, whose heads may hold different numbers of tokens each. Read only.

    query:       [num_reqs, num_layers, num_queries, num_heads, head_size] the last queries, RoPE applied. Query i
                 belongs to the token with cache index kv_len - num_queries + i of every head
    keys:        [num_pages, block_size, head_size] pages to read from, as in ``ScoreInputs``
    read_values: returns values [num_pages, block_size, head_size] likewise; it may copy them, if a policy looks at them
    page_table:  [num_reqs, num_layers, num_kv_heads, max_pages] int64, logical page -> page id; behind the last one of
                 a head any page
    kv_lens:     [num_reqs, num_layers, num_kv_heads] int64, tokens of each head; it may be fewer than queries
    max_kv_len:  the largest of them, or more
    scale:       softmax scale, times what stored keys are to be multiplied by
    value_scale: what stored values are to be multiplied by
    state:       [num_reqs, num_layers, num_kv_heads, max_kv_len] float32, what the policy has summed up of each token
                 before these queries, 0 for tokens that are theirs; None if it does not observe all queries
    alike:       whether the heads of a layer hold the same tokens
    key_scale:   what stored keys are to be multiplied by, which ``scale`` has in it
    layers:      index of each layer
    weights:     of each layer, as far as the policy's needs name them
    num_kept:    [num_reqs, num_layers, num_kv_heads] int64, tokens that each head will keep, on average at the end of
                 a prompt; None where that is not known yet
    output:      shape of the query, what attention returned for the queries, if ``Need.OUTPUTS``
    """

    query: torch.Tensor
    keys: torch.Tensor
    read_values: Callable[[], torch.Tensor]
    page_table: torch.Tensor
    kv_lens: torch.Tensor
    max_kv_len: int
    scale: float
    value_scale: float = 1.0
    state: Any = None
    alike: bool = False
    key_scale: float = 1.0
    layers: Sequence[int] = ()
    weights: Sequence[LayerWeights] = ()
    num_kept: torch.Tensor | None = None
    output: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of scores: num_reqs, num_layers, num_kv_heads, max_kv_len."""
        num_reqs, num_layers, num_kv_heads = self.kv_lens.shape
        return num_reqs, num_layers, num_kv_heads, self.max_kv_len

    @cached_property
    def values(self) -> torch.Tensor:
        """[num_pages, block_size, head_size], what ``read_values`` returns."""
        return self.read_values()

    @cached_property
    def grouped_query(self) -> torch.Tensor:
        """[num_reqs * num_layers * num_kv_heads, group, num_queries, head_size] float32, all heads in a row."""
        return by_kv_head(self.query, self.kv_lens.shape[2]).flatten(0, 2)

    @cached_property
    def grouped_output(self) -> torch.Tensor | None:
        """As ``grouped_query``, the outputs of the queries."""
        return None if self.output is None else by_kv_head(self.output, self.kv_lens.shape[2]).flatten(0, 2)

    @property
    def _no_values(self) -> torch.Tensor:
        """What stands for the values where nothing reads them."""
        return self.keys.new_empty(self.keys.shape[2]).expand(self.keys.shape)

    def window_scores(self, reduction: Reduction) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads, max_kv_len] float32, scores by the attention of the queries.

        What is not scored is 0: the queries' own tokens, unless the reduction says that they count, and what no head
        holds.
        """
        num_queries, num_kv_heads = self.query.shape[2], self.kv_lens.shape[2]
        query = self.query.unflatten(3, (num_kv_heads, -1)).transpose(2, 3)  # every head a request of one KV head
        # a head with fewer tokens than queries has none to be judged: what is read behind them changes no score
        num_missing = -(-num_queries // self.keys.shape[1]) - self.page_table.shape[3]
        page_table = F.pad(self.page_table, (0, num_missing)) if num_missing > 0 else self.page_table
        batch = WindowBatch(
            query.flatten(0, 2),
            self.keys,
            self.values if reduction.weight != "none" else self._no_values,
            page_table.flatten(0, 2)[:, None],
            self.kv_lens.flatten().clamp(min=num_queries),
            max(self.max_kv_len, num_queries),
            self.scale,
            self.value_scale,
        )
        return window_scores(batch, reduction)[..., : self.max_kv_len].view(self.shape)

    def slot_scores(self, query: torch.Tensor, last_seen: torch.Tensor, group: Group, fusion: Fusion) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads, max_kv_len] float32, scores by the attention that ``query`` pays.

        What no query sees is 0.

        query:     [num_reqs, num_layers, num_queries, num_heads, head_size], any number of heads for each KV head
        last_seen: [num_reqs, num_layers, num_kv_heads, num_queries] int64, the last cache index that a query sees
        group:     over the query heads of one KV head, of each query by itself
        fusion:    over the queries, then; "none" returns [num_reqs, num_layers, num_kv_heads, num_queries, max_kv_len]
        """
        block_size = self.keys.shape[1]
        page_table = self.page_table[..., : -(-self.max_kv_len // block_size)]
        index = torch.arange(page_table.shape[3] * block_size, device=query.device)
        positions = index.where(index < self.kv_lens[..., None], -1)
        query = query.unflatten(3, (self.kv_lens.shape[2], -1)).transpose(2, 3)  # every head a request of one KV head
        batch = SlotBatch(
            query.flatten(0, 2),
            self.keys,
            page_table.flatten(0, 2)[:, None],
            positions.flatten(0, 2)[:, None],
            last_seen.flatten(0, 2).contiguous(),
            self.scale,
        )
        scores = slot_scores(batch, group, fusion)[..., : self.max_kv_len]
        return scores.view(*self.shape[:3], *scores.shape[2:])

    def mean_over_peers(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the mean over those heads of a layer that hold as many tokens: the same ones, with ``uniform``.

        scores:  [num_reqs, num_layers, num_kv_heads, *]
        returns: likewise, of one head if all are alike
        """
        if self.alike:
            return scores.mean(dim=2, keepdim=True)
        lens = self.kv_lens.view(*self.kv_lens.shape, *[1] * (scores.dim() - 3))
        are_peers = lens[:, :, None] == lens[:, :, :, None]
        return (scores[:, :, None] * are_peers).sum(dim=3) / are_peers.sum(dim=3)

    def new_scores(self) -> torch.Tensor:
        """Return [num_reqs * num_layers * num_kv_heads, max_kv_len] float32 to be filled, tile by tile."""
        return self.keys.new_empty(self.kv_lens.numel(), self.max_kv_len, dtype=torch.float32)

    def head_tiles(self, num_bytes: int) -> Iterator[slice]:
        """Yield tiles of all heads, in a row, of which a tile of tokens fits into the scratch.

        num_bytes: what is held at once by each token of a head
        """
        of_head = num_bytes * min(_TILE, self.max_kv_len)
        yield from itertools.starmap(slice, scratch.tiles([of_head] * self.kv_lens.numel()))

    def token_tiles(self, size: int = _TILE, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield bounds of tiles of at most ``size`` tokens, up to ``end``; None: of all."""
        last = self.max_kv_len if end is None else end
        for start in range(0, last, size):
            yield start, min(start + size, last)

    def gather_keys(self, heads: slice, start: int, end: int) -> torch.Tensor:
        """Return [num_heads, end - start, head_size] float32, keys of a tile of all heads; anything behind a head's.

        heads: of [num_reqs * num_layers * num_kv_heads]
        """
        return self._gather(self.keys, self.key_scale, heads, start, end)

    def gather_values(self, heads: slice, start: int, end: int) -> torch.Tensor:
        """Return [num_heads, end - start, head_size] float32, values likewise."""
        return self._gather(self.values, self.value_scale, heads, start, end)

    def _gather(self, pages: torch.Tensor, scale: float, heads: slice, start: int, end: int) -> torch.Tensor:
        block_size = pages.shape[1]
        first = start // block_size
        page_ids = self.page_table.flatten(0, 2)[heads, first : -(-end // block_size)]
        gathered = pages[page_ids].flatten(1, 2)[:, start - first * block_size : end - first * block_size].float()
        return gathered if scale == 1.0 else gathered.mul_(scale)

    def fill_last(self, scores: torch.Tensor, value: torch.Tensor, num_last: int | None = None) -> torch.Tensor:
        """In place: give the last tokens of each head another score: 0 in heads that hold nothing else.

        scores:   [num_reqs, num_layers, num_kv_heads, max_kv_len], or of one head, if all are alike
        value:    [num_reqs, num_layers, 1, 1]
        num_last: how many; None: the queries' own
        """
        if num_last is None:
            num_last = self.query.shape[2]
        kv_lens = self.kv_lens[:, :, : scores.shape[2], None]
        last = kv_lens + torch.arange(-num_last, 0, device=scores.device)
        value = value.masked_fill(kv_lens <= num_last, 0.0).expand(last.shape)
        return scores.scatter_(3, last.clamp(min=0), value)


def by_kv_head(queries: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Return [..., num_kv_heads, group, num_queries, head_size] float32.

    queries: [..., num_queries, num_heads, head_size]
    """
    grouped: torch.Tensor = queries.float().transpose(-3, -2).unflatten(-3, (num_kv_heads, -1))
    return grouped


@cache
def scores_batches(policy: type) -> bool:
    """Whether a policy scores several requests at once: its ``score_batch`` is not older than its other ways.

    A subclass that changes ``score`` only is asked request by request.
    """
    for cls in policy.__mro__:
        ways = [way for way in _WAYS_TO_SCORE if way in vars(cls)]
        if ways:
            return "score_batch" in ways
    return False
