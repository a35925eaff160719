"""Rows of a batch that a policy looks at, layer by layer: alone, or together where one call sees several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeAlias

import torch

from vllm_kvevict.cache.pages import BlockPages
from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.engine.worker.watched import BatchRow, LayerPass
from vllm_kvevict.eviction.prompt import Eviction, Evictions
from vllm_kvevict.eviction.resident import ResidentEvictions
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.batch import observes_chunks
from vllm_kvevict.policies.inputs import LayerWeights, ScoreInputs
from vllm_kvevict.policies.prompt_chunks import PromptChunks


@dataclass
class ChunkGroup:
    """Chunks of prompts that were evicted before, and are evicted again behind them, whose layers are scored together.

    rows:  of the batch, in the order of the requests of ``evictions``
    parts: of one row each, once they go on one by one
    """

    rows: list[BatchRow]
    evictions: ResidentEvictions
    parts: list[ChunkGroup] = field(default_factory=list)

    @property
    def req_ids(self) -> list[str]:
        return [row.req_id for row in self.rows]

    def observe(self, ran: LayerPass) -> None:
        """Score a layer of all rows."""
        request, layers = self.rows[0].request, range(ran.layer, ran.layer + 1)
        last = torch.stack([ran.last[row.req_id] for row in self.rows])[:, None]
        is_observed = Need.ALL_QUERIES in request.needs
        chunk = torch.stack([row.of(ran.queries) for row in self.rows])[:, None] if is_observed else last[:, :, :0]
        self.evictions.score_layers(layers, last, chunk, [ran.scale], [ran.weights_for(request)])

    def break_up(self) -> None:
        """From now on each row goes on alone, with what has been scored so far."""
        if not self.parts:
            self.parts = [ChunkGroup([row], self.evictions.alone(place)) for place, row in enumerate(self.rows)]


@dataclass
class PrefillRow(BatchRow):
    """A chunk of a prompt that will be evicted.

    block_ids:   [num_blocks] int64, the block table up to the end of the chunk
    eviction:    set if the chunk is the last one
    looks_ahead: whether pseudo tokens follow
    selected:    if they do, per layer [num_kv_heads, num_selected] int64: slots that they see, -1 for none
    last:        if they do, per layer [num_queries, num_heads, head_size]: the last queries
    pseudo:      once they have come, per layer [num_tokens, num_heads, head_size]: their queries
    """

    block_ids: torch.Tensor
    eviction: Eviction | None
    looks_ahead: bool = False
    selected: list[torch.Tensor] = field(default_factory=list)
    last: list[torch.Tensor] = field(default_factory=list)
    pseudo: Sequence[torch.Tensor] = ()

    @property
    def rows(self) -> list[PrefillRow]:
        return [self]

    def observe(self, ran: LayerPass) -> None:
        """See what a layer has done, and score it if the chunk is the last one."""
        self.request.num_tokens = self.kv_len
        if self.eviction is None:
            return
        last, weights = ran.last[self.req_id], ran.weights_for(self.request)
        if self.looks_ahead:
            self.selected.append(self.eviction.preselect_layer(ran.layer, last, ran.scale, weights))
            self.last.append(last)
        else:
            self._score(self.eviction, ran.layer, last, ran.scale, weights)

    def forget(self) -> None:
        """All of its layers are scored: what was gathered for the pseudo tokens has served."""
        self.selected, self.last, self.pseudo = [], [], ()

    def score_ahead(self, layer: int, scale: float, weights: LayerWeights) -> None:
        """Score a layer by the pseudo tokens that have followed."""
        if self.eviction is not None:
            self._score(self.eviction, layer, self.last[layer], scale, weights, self.pseudo[layer])

    def _score(
        self,
        eviction: Eviction,
        layer: int,
        last: torch.Tensor,
        scale: float,
        weights: LayerWeights,
        pseudo_query: torch.Tensor | None = None,
    ) -> None:
        request = self.request
        outputs = request.outputs.last(layer) if Need.OUTPUTS in request.needs else None
        eviction.score_layer(layer, last, scale, outputs, weights, request.states[layer], pseudo_query)
        request.forget_state(layer)


@dataclass
class PrefillGroup:
    """Last chunks of prompts whose layers are scored together.

    rows:  of the batch, in the order of the members of ``evictions``
    parts: these once they go on one by one, none until then
    """

    rows: list[PrefillRow]
    evictions: Evictions
    parts: list[PrefillRow] = field(default_factory=list)

    @property
    def req_ids(self) -> list[str]:
        return [row.req_id for row in self.rows]

    @property
    def looks_ahead(self) -> bool:
        """Whether pseudo tokens follow, which they do for all or none."""
        return self.rows[0].looks_ahead

    def observe(self, ran: LayerPass) -> None:
        """As ``PrefillRow.observe``, of all rows."""
        for row in self.rows:
            row.request.num_tokens = row.kv_len
        last, weights = [ran.last[row.req_id] for row in self.rows], ran.weights_for(self.rows[0].request)
        if not self.looks_ahead:
            self._score(ran.layer, last, ran.scale, weights)
            return
        selected = self.evictions.preselect_layer(ran.layer, last, ran.scale, weights)
        for row, slots, of_row in zip(self.rows, selected, last, strict=True):
            row.selected.append(slots)
            row.last.append(of_row)

    def score_ahead(self, layer: int, scale: float, weights: LayerWeights) -> None:
        """As ``PrefillRow.score_ahead``, of all rows."""
        pseudo = [row.pseudo[layer] for row in self.rows]
        self._score(layer, [row.last[layer] for row in self.rows], scale, weights, pseudo)

    def _score(
        self,
        layer: int,
        last: list[torch.Tensor],
        scale: float,
        weights: LayerWeights,
        pseudo_query: list[torch.Tensor] | None = None,
    ) -> None:
        requests = [row.request for row in self.rows]
        asks = Need.OUTPUTS in requests[0].needs
        outputs = [request.outputs.last(layer) if asks else None for request in requests]
        states = [request.states[layer] for request in requests]
        self.evictions.score_layer(layer, last, scale, outputs, weights, states, pseudo_query)
        for request in requests:
            request.forget_state(layer)

    def break_up(self) -> None:
        """From now on each row is observed by itself."""
        if not self.parts:
            self.evictions.break_up()
            self.parts = self.rows


@dataclass
class ObservedChunks:
    """Chunks of prompts whose policy observes all queries: one call looks at those of several, if it can.

    rows:  of the batch
    pages: of their blocks
    parts: of one row each, once they go on one by one
    """

    rows: list[PrefillRow]
    pages: BlockPages
    parts: list[ObservedChunks] = field(default_factory=list)

    def observe(self, ran: LayerPass) -> None:
        """Let the policy look at a layer of all rows. If it fails, it has seen nothing of any."""
        start = perf_counter()
        requests = [row.request for row in self.rows]
        policy, states = requests[0].method.policy, [request.states[ran.layer] for request in requests]
        if observes_chunks(policy):
            found = policy.observe_chunks(states, self._chunks(ran))
        else:
            found = [policy.observe(states[0], self._inputs(ran))]
        if len(found) != len(requests):
            name = type(policy).__name__
            raise ValueError(f"{name}.observe_chunks: expected {len(requests)} states, got {len(found)}")
        for request, state in zip(requests, found, strict=True):
            request.states[ran.layer] = state
            request.seconds += (perf_counter() - start) / len(requests)

    def _chunks(self, ran: LayerPass) -> PromptChunks:
        queries, weights = [row.of(ran.queries) for row in self.rows], ran.weights_for(self.rows[0].request)
        keys, values, page_table = ran.pool.readable(self.pages.of_layer(ran.layer))
        return PromptChunks(
            torch.cat(queries) if len(queries) > 1 else queries[0],
            [len(of_row) for of_row in queries],
            [row.kv_len for row in self.rows],
            keys,
            lambda: values,
            page_table,
            ran.scale,
            weights.key_scale,
            weights.value_scale,
            weights.rotary,
            weights.softcap,
            weights.sinks,
        )

    def _inputs(self, ran: LayerPass) -> ScoreInputs:
        """Return the same of a single row, for a policy that sees one prompt at a time."""
        chunks = self._chunks(ran)
        return ScoreInputs(
            chunks.query,
            chunks.keys,
            chunks.read_values(),
            chunks.page_table[0],
            chunks.kv_lens[0],
            chunks.scale,
            weights=ran.weights_for(self.rows[0].request),
            layer=ran.layer,
        )

    def break_up(self) -> None:
        """From now on each row is observed by itself."""
        if not self.parts:
            self.parts = [
                ObservedChunks([row], self.pages.only(place, len(row.block_ids))) for place, row in enumerate(self.rows)
            ]


Prefill: TypeAlias = PrefillGroup | PrefillRow | ChunkGroup | ObservedChunks


def look(prefill: Prefill, failures: Failures, doing: str, see: Callable[[Any], None]) -> None:
    """Let a policy see all rows together if it can, and each alone where that fails: who is to blame fails then.

    see: lets it see rows, together or one
    """
    if isinstance(prefill, PrefillRow) or len(prefill.rows) == 1:
        failures.ask(prefill.rows[0].req_id, doing, see, prefill)
        return
    if any(row.req_id in failures for row in prefill.rows):
        prefill.break_up()
    if not prefill.parts and failures.together(doing, see, prefill):
        return
    prefill.break_up()
    for part in prefill.parts:
        failures.ask(part.rows[0].req_id, doing, see, part)
