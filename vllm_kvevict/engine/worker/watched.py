"""Requests that will be evicted: what a worker gathers of them while they are computed, and from which rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from vllm_kvevict.budgets.auto import AutoBudget
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction, Evictions
from vllm_kvevict.eviction.resident import ResidentEviction
from vllm_kvevict.eviction.results import checked
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.policies.base import LayerWeights, Need, ScoreInputs


class LastRows:
    """The last rows of one request in every layer, gathered over chunks of any size."""

    def __init__(self, num_layers: int, window: int) -> None:
        self._window = window
        self._rows: list[torch.Tensor | None] = [None] * num_layers

    def extend(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Append a chunk [num_tokens, num_heads, head_size]; return the last ``window`` rows so far."""
        earlier = self._rows[layer]
        last = rows if earlier is None else torch.cat([earlier, rows[max(len(rows) - self._window, 0) :]])
        # a copy: the engine reuses its buffers in the next step
        last = self._rows[layer] = last[max(len(last) - self._window, 0) :].clone()
        return last

    def last(self, layer: int) -> torch.Tensor:
        """Return the last ``window`` rows of a layer that has seen a chunk."""
        rows = self._rows[layer]
        if rows is None:
            raise RuntimeError(f"layer {layer} has seen no chunk")
        return rows


class WatchedRequest:
    """What was seen of one request, from its first chunk to its last eviction.

    num_tokens: tokens whose queries were seen
    auto_budget: how its budget is chosen; None if it is fixed
    likelihood: negative log-likelihoods of those of its tokens that were looked at, nats, if its budget is chosen
    waiting: hidden state [hidden_size] of the last token so far, if it is to be looked at
    seconds: what observing took so far
    """

    def __init__(self, req_id: str, method: Method, num_layers: int, auto_budget: AutoBudget | None = None) -> None:
        self.req_id = req_id
        self.method = method
        self.auto_budget = auto_budget
        self.likelihood: list[float] = []
        self.waiting: torch.Tensor | None = None
        traits = traits_of(method.policy)
        self.needs = traits.needs
        self.num_pseudo_tokens = traits.num_pseudo_tokens
        self.queries = LastRows(num_layers, method.query_window)
        self.outputs = LastRows(num_layers, method.query_window)
        self.states: list[Any] = [None] * num_layers
        self.num_tokens = 0
        self.seconds = 0.0

    @property
    def nll(self) -> float | None:
        """Mean negative log-likelihood of its tokens, nats; None if none was looked at."""
        return sum(self.likelihood) / len(self.likelihood) if self.likelihood else None

    def check_states(self, shape: tuple[int, int], device: torch.device) -> None:
        """Raise ValueError or TypeError unless the policy has summed up [num_kv_heads, num_tokens] of every layer."""
        if Need.ALL_QUERIES in self.needs:
            for state in self.states:
                checked(f"{type(self.method.policy).__name__}.observe", state, shape, device)

    def forget_state(self, layer: int) -> None:
        """What was summed up of a layer that is scored has served, unless evictions go on after the prompt's."""
        if not self.method.schedule.is_bounded:
            self.states[layer] = None

    def take_states(self) -> list[torch.Tensor] | None:
        """Return what the policy has summed up per token in every layer, None if nothing; it is forgotten here."""
        states, self.states = self.states, [None] * len(self.states)
        return states if Need.ALL_QUERIES in self.needs else None


@dataclass(frozen=True)
class LayerPass:
    """A layer whose attention has run over a batch.

    query:  [num_tokens, num_heads, head_size] of the whole batch
    output: likewise, what attention returned
    scale:  softmax scale
    """

    pool: PagePool
    layer: int
    query: torch.Tensor
    output: torch.Tensor
    scale: float
    weights: LayerWeights


@dataclass
class ChunkRow:
    """One row of a batch: a chunk of a prompt that was evicted before, and is evicted again behind it.

    start, end: its tokens in the batch
    """

    request: WatchedRequest
    start: int
    end: int
    eviction: ResidentEviction

    def observe(self, ran: LayerPass) -> None:
        """As ``PrefillRow.observe``."""
        chunk = ran.query[self.start : self.end]
        last = self.request.queries.extend(ran.layer, chunk)
        self.eviction.score_layer(ran.layer, last, chunk, ran.scale, ran.weights)


@dataclass
class PrefillRow:
    """One row of a batch: a chunk of a prompt that will be evicted.

    start, end: its tokens in the batch
    block_ids:  [num_blocks] int64, the block table up to the end of the chunk
    kv_len:     tokens in the cache at the end of the chunk
    eviction:   set if the chunk is the last one
    last:       of the layer that was seen last, the queries that the policy or the allocator looks at
    outputs:    likewise, what attention returned for them, if the policy asks for it
    selected:   of the last chunk, per layer [num_kv_heads, num_selected] int64: slots that pseudo tokens see
    """

    request: WatchedRequest
    start: int
    end: int
    block_ids: torch.Tensor
    kv_len: int
    eviction: Eviction | None
    selected: list[torch.Tensor] = field(default_factory=list)
    last: torch.Tensor = field(init=False)
    outputs: torch.Tensor | None = field(init=False, default=None)

    def observe(self, ran: LayerPass) -> None:
        """See what a layer has done, and score it if the chunk is the last one."""
        self.see(ran)
        layer, scale, weights = ran.layer, ran.scale, ran.weights
        if self.eviction is not None and self.request.num_pseudo_tokens:
            slots = self.eviction.preselect_layer(layer, self.last, scale, weights)
            if self.selected and slots.shape != self.selected[0].shape:
                raise ValueError(f"expected as many selected tokens in every layer, got {slots.shape[1]} in {layer}")
            self.selected.append(slots)
        elif self.eviction is not None:
            self.eviction.score_layer(layer, self.last, scale, self.outputs, weights, self.request.states[layer])
            self.request.forget_state(layer)

    def see(self, ran: LayerPass) -> None:
        """As ``observe``, but score nothing."""
        request, layer = self.request, ran.layer
        chunk = ran.query[self.start : self.end]
        request.num_tokens = self.kv_len
        if Need.OUTPUTS in request.needs:
            self.outputs = request.outputs.extend(layer, ran.output[self.start : self.end])
        if Need.ALL_QUERIES in request.needs:
            start = perf_counter()
            inputs = ScoreInputs(
                chunk,
                *ran.pool.readable(ran.pool.layer_page_ids(layer, self.block_ids)),
                self.kv_len,
                ran.scale,
                weights=ran.weights,
                layer=layer,
            )
            request.states[layer] = request.method.policy.observe(request.states[layer], inputs)
            request.seconds += perf_counter() - start
        self.last = request.queries.extend(layer, chunk)

    def score(self, layer: int, scale: float, weights: LayerWeights, pseudo_query: torch.Tensor) -> None:
        """Score a layer of a prompt that pseudo tokens [num_tokens, num_heads, head_size] have followed."""
        request = self.request
        if self.eviction is not None:
            outputs = request.outputs.last(layer) if Need.OUTPUTS in request.needs else None
            last, state = request.queries.last(layer), request.states[layer]
            self.eviction.score_layer(layer, last, scale, outputs, weights, state, pseudo_query)
            request.forget_state(layer)


@dataclass
class PrefillGroup:
    """Last chunks of prompts whose layers are scored together.

    rows:     of the batch, in the order of the members of ``evictions``
    is_whole: False once they go on one by one
    """

    rows: list[PrefillRow]
    evictions: Evictions
    is_whole: bool = True

    @property
    def req_ids(self) -> list[str]:
        return [row.request.req_id for row in self.rows]

    def observe(self, ran: LayerPass) -> None:
        """As ``PrefillRow.observe``, of all rows."""
        for row in self.rows:
            row.see(ran)
        self.evictions.score_layer(ran.layer, [row.last for row in self.rows], ran.scale, weights=ran.weights)

    def break_up(self) -> None:
        """From now on each row is observed by itself."""
        if self.is_whole:
            self.evictions.break_up()
            self.is_whole = False
