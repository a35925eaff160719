"""What a policy sees of several requests at once, and whether it can score them so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vllm_kvevict.cache.ragged import padded
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.kernels.slot_scores import Fusion, Group, SlotBatch, slot_scores
from vllm_kvevict.kernels.window_batch import Reduction, WindowBatch
from vllm_kvevict.kernels.window_scores import window_scores
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.stretches import TILE

# of a policy, the ways to do something: for one request, and as the last one for several
_TO_SCORE = ("score", "score_layers", "score_batch")
_TO_OBSERVE = ("observe", "observe_chunks")
_TO_PRESELECT = ("preselect", "preselect_batch")


class Prompt(NamedTuple):
    """What the host knows of a prompt that is evicted: its tokens, and how many a head keeps on average, if known."""

    num_tokens: int
    num_kept: int | None


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
                 before these queries, 0 for tokens that are theirs; None if it does not observe all queries, and of
                 prompts, of which ``observed`` has it
    alike:       whether the heads of a layer hold the same tokens
    key_scale:   what stored keys are to be multiplied by, which ``scale`` has in it
    layers:      index of each layer
    num_kept:    [num_reqs, num_layers, num_kv_heads] int64, tokens that each head will keep, on average at the end of
                 a prompt; None where that is not known yet
    output:      shape of the query, what attention returned for the queries, if ``Need.OUTPUTS``
    projections: [hidden_size, num_heads * head_size], W_O of each layer, if ``Need.OUTPUT_PROJECTION``
    softcap:     of logits, as in ``LayerWeights``
    sinks:       [num_layers, num_heads] float32 likewise; None: there are none

    Of prompts, which are evicted for the first time, also:

    prompts:      of each request
    observed:     what the policy's ``observe`` or ``observe_chunks`` returned for the last chunk, of a request all
                  layers, then of the next one; if ``Need.ALL_QUERIES``
    rotary:       of these layers, if ``Need.ROTARY``
    pseudo_query: [num_reqs, num_layers, num_pseudo_tokens, num_heads, head_size] queries of the tokens that the engine
                  generated behind the prompts, zeros behind those of a request that has fewer; None if the policy asked
                  for none
    num_pseudo:   [num_reqs] int64, how many each has
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
    num_kept: torch.Tensor | None = None
    output: torch.Tensor | None = None
    projections: Sequence[torch.Tensor] = ()
    prompts: Sequence[Prompt] = ()
    observed: Sequence[Any] = ()
    rotary: Rotary | None = None
    pseudo_query: torch.Tensor | None = None
    num_pseudo: torch.Tensor | None = None
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

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

    def sinks_for(self, num_heads: int) -> torch.Tensor | None:
        """Return [num_reqs * num_layers * num_kv_heads, group] float32, the sinks of all heads in a row, if there are
        any; of queries of ``num_heads`` heads.
        """
        if self.sinks is None:
            return None
        num_reqs, _, num_kv_heads = self.kv_lens.shape
        of_layers = sinks_for(self.sinks, num_heads, num_kv_heads)
        return of_layers.expand(num_reqs, *of_layers.shape).flatten(0, 2)

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
            self.softcap,
            self.sinks_for(self.query.shape[3]),
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
        sinks = self.sinks_for(query.shape[3])
        query = query.unflatten(3, (self.kv_lens.shape[2], -1)).transpose(2, 3)  # every head a request of one KV head
        batch = SlotBatch(
            query.flatten(0, 2),
            self.keys,
            page_table.flatten(0, 2)[:, None],
            self._positions(page_table.shape[3] * block_size)[:, None],
            last_seen.flatten(0, 2).contiguous(),
            self.scale,
            self.softcap,
            sinks,
        )
        scores = slot_scores(batch, group, fusion)[..., : self.max_kv_len]
        return scores.view(*self.shape[:3], *scores.shape[2:])

    def _positions(self, num_slots: int) -> torch.Tensor:
        """Return [num_reqs * num_layers * num_kv_heads, num_slots] int64, the cache index in each slot, -1 behind a
        head's tokens.
        """
        index = torch.arange(num_slots, device=self.kv_lens.device)
        return index.where(index < self.kv_lens.flatten()[:, None], -1)

    @property
    def are_peers(self) -> torch.Tensor:
        """[num_reqs, num_layers, num_kv_heads, num_kv_heads] bool, which heads of a layer hold equally many tokens."""
        are_peers: torch.Tensor = self.kv_lens[..., None] == self.kv_lens[:, :, None]
        return are_peers

    def sum_over_peers(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the sum over those heads of a layer that hold as many tokens: the same ones, with ``uniform``.

        Head by head: torch's own sum over the heads rounds by the place of a token in its row.

        scores:  [num_reqs, num_layers, num_kv_heads, *]
        returns: likewise, of one head if all are alike
        """
        of_heads = scores.split(1, dim=2)
        if self.alike:
            summed: torch.Tensor = reduce(torch.add, of_heads)
            return summed
        shape = *self.kv_lens.shape, *[1] * (scores.dim() - 3)
        of_peers = (
            torch.where(are_peers.view(shape), of_head, 0.0)
            for are_peers, of_head in zip(self.are_peers.unbind(3), of_heads, strict=True)
        )
        return reduce(torch.add, of_peers)

    def mean_over_peers(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the mean over the same heads; arguments and result are those of ``sum_over_peers``."""
        summed = self.sum_over_peers(scores)
        num_peers = self.are_peers.sum(dim=3)[:, :, : summed.shape[2]]
        return summed / num_peers.view(*num_peers.shape, *[1] * (summed.dim() - 3))

    def max_over_peers(self, of_heads: torch.Tensor) -> torch.Tensor:
        """Return the highest number of the same heads [num_reqs, num_layers, num_kv_heads], of one if all are alike."""
        if self.alike:
            return of_heads.amax(dim=2, keepdim=True)
        return of_heads[:, :, None].where(self.are_peers, float("-inf")).amax(dim=3)

    def of_tokens(self, observed: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads, max_kv_len] float32 of what is known of each token of prompts: 0
        behind them.

        observed: of a request all layers, then of the next one, [num_kv_heads, num_tokens] each
        """
        if len(observed) == 1 and observed[0].shape[1] == self.max_kv_len:
            return observed[0][None, None]
        together = padded(observed, [self.max_kv_len] * len(observed), dim=1)
        by_prompt: torch.Tensor = together.unflatten(1, (*self.shape[:2], self.max_kv_len)).permute(1, 2, 0, 3)
        return by_prompt

    def new_scores(self) -> torch.Tensor:
        """Return [num_reqs * num_layers * num_kv_heads, max_kv_len] float32 to be filled, tile by tile."""
        return self.keys.new_empty(self.kv_lens.numel(), self.max_kv_len, dtype=torch.float32)

    def head_tiles(self, num_bytes: int, size: int = TILE, heads: range | None = None) -> Iterator[slice]:
        """Yield tiles of heads, in a row, of which a tile of tokens fits into the scratch.

        num_bytes: what is held at once by each token of a head
        size:      tokens of a tile
        heads:     which of all heads; None: all
        """
        heads = range(self.kv_lens.numel()) if heads is None else heads
        of_head = num_bytes * min(size, self.max_kv_len)
        for first, end in scratch.tiles([of_head] * len(heads)):
            yield slice(heads[first], heads[end - 1] + 1, heads.step)

    def token_tiles(self, size: int = TILE, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield bounds of tiles of at most ``size`` tokens, up to ``end``; None: of all."""
        last = self.max_kv_len if end is None else end
        for start in range(0, last, size):
            yield start, min(start + size, last)

    def tiles(self, num_bytes: int, size: int = TILE) -> Iterator[tuple[slice, int, int]]:
        """Yield tiles of heads, as ``head_tiles``, each with bounds of tiles of tokens, as ``token_tiles``."""
        for heads in self.head_tiles(num_bytes, size):
            for start, end in self.token_tiles(size):
                yield heads, start, end

    def gather_keys(self, heads: slice, start: int, end: int) -> torch.Tensor:
        """Return [num_heads, end - start, head_size] float32, keys of a tile of all heads; anything behind a head's.

        heads: of [num_reqs * num_layers * num_kv_heads]
        """
        return self._gather(self.keys, self.key_scale, heads, start, end)

    def gather_values(self, heads: slice, start: int, end: int) -> torch.Tensor:
        """Return [num_heads, end - start, head_size] float32, values likewise."""
        return self._gather(self.values, self.value_scale, heads, start, end)

    def is_behind(self, heads: slice, start: int, end: int) -> torch.Tensor:
        """Return [num_heads, end - start] bool, what is behind the tokens of its head, likewise."""
        place = torch.arange(start, end, device=self.kv_lens.device)
        return place >= self.kv_lens.flatten()[heads, None]

    def _gather(self, pages: torch.Tensor, scale: float, heads: slice, start: int, end: int) -> torch.Tensor:
        return gather_tokens(pages, self.page_table.flatten(0, 2)[heads], scale, start, end)

    def fill_last(
        self, scores: torch.Tensor, value: torch.Tensor | None = None, num_last: int | None = None
    ) -> torch.Tensor:
        """In place: give the last tokens of each head another score: 0 in heads that hold nothing else.

        scores:   [num_reqs, num_layers, num_kv_heads, max_kv_len], or of one head, if all are alike
        value:    [num_reqs, num_layers, 1 or num_kv_heads, 1]; None: the highest score of the heads of a layer that
                  hold as many tokens
        num_last: how many; None: the queries' own
        """
        if value is None:
            value = self.max_over_peers(scores.amax(dim=3))[..., None]
        if num_last is None:
            num_last = self.query.shape[2]
        kv_lens = self.kv_lens[:, :, : scores.shape[2], None]
        last = kv_lens + torch.arange(-num_last, 0, device=scores.device)
        value = value.masked_fill(kv_lens <= num_last, 0.0).expand(last.shape)
        return scores.scatter_(3, last.clamp(min=0), value)


def sinks_for(sinks: torch.Tensor, num_heads: int, num_kv_heads: int) -> torch.Tensor:
    """Return [*, num_kv_heads, group], the sinks of queries of ``num_heads`` heads: of a sum of the queries of a group,
    whose logits are sums, a sum.

    sinks: [*, num_heads] of the model's heads
    """
    by_head: torch.Tensor = sinks.unflatten(-1, (num_kv_heads, -1))
    return by_head if num_heads == sinks.shape[-1] else by_head.sum(dim=-1, keepdim=True)


def gather_tokens(pages: torch.Tensor, page_table: torch.Tensor, scale: float, start: int, end: int) -> torch.Tensor:
    """Return [num_heads, end - start, head_size] float32, what some pages hold of tokens ``start`` to ``end``.

    pages:      [num_pages, block_size, head_size] as stored
    page_table: [num_heads, max_pages] int64, logical page -> page id
    scale:      what stored numbers are to be multiplied by
    """
    block_size = pages.shape[1]
    first = start // block_size
    page_ids = page_table[:, first : -(-end // block_size)]
    tokens = pages[page_ids].contiguous().flatten(1, 2)  # in one layout, also where they are of one page only
    gathered = tokens[:, start - first * block_size : end - first * block_size].float()
    return gathered if scale == 1.0 else gathered.mul_(scale)


def by_kv_head(queries: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Return [..., num_kv_heads, group, num_queries, head_size] float32.

    queries: [..., num_queries, num_heads, head_size]
    """
    grouped: torch.Tensor = queries.float().transpose(-3, -2).unflatten(-3, (num_kv_heads, -1))
    return grouped


def scores_batches(policy: object) -> bool:
    """Whether a policy scores several requests at once, and so does one that it wraps.

    Its ``score_batch`` is then not older than its other ways: a subclass that changes ``score`` only is asked request
    by request.
    """
    return _is_for_several(policy, _TO_SCORE)


def observes_chunks(policy: object) -> bool:
    """Whether a policy that observes all queries looks at chunks of several prompts at once, likewise."""
    return _is_for_several(policy, _TO_OBSERVE)


def preselects_batches(policy: object) -> bool:
    """Whether a policy that wants pseudo tokens chooses at once what those of several prompts see, likewise."""
    return _is_for_several(policy, _TO_PRESELECT)


def _is_for_several(policy: object, ways: tuple[str, ...]) -> bool:
    kind: type = type(policy)
    if _newest(kind, ways) != ways[-1]:
        return False
    wrapped = getattr(policy, "wrapped", None)  # of a WrapperPolicy
    return wrapped is None or _is_for_several(wrapped, ways)


@cache
def _newest(policy: type, ways: tuple[str, ...]) -> str:
    """Return the last of ``ways`` that the youngest class has which has any."""
    return next(
        found[-1] for cls in policy.__mro__ if (found := [way for way in ways if way in vars(cls)])
    )  # fmt: skip
