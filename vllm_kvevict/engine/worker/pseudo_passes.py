"""The passes of the model over pseudo tokens, for policies that want them: inside the worker, as a drafter's are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.forward_context import set_forward_context

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.ragged import padded
from vllm_kvevict.cache.staging import to_device, to_host
from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.engine.worker.prefills import PrefillGroup, PrefillRow, look
from vllm_kvevict.eviction.pseudo_tokens import PseudoDecode


@dataclass(frozen=True)
class PseudoPassMetadata:
    """Takes the place of attention metadata in a pass over pseudo tokens."""

    decode: PseudoDecode
    layer: int
    weights: ModelWeights

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Return [num_reqs, num_heads, head_size]; the arguments are those of ``PseudoDecode.attend``."""
        weights = self.weights.of(self.layer, frozenset())
        return self.decode.attend(self.layer, query, key, value, scale, weights)


class PseudoPasses:
    """Generates the pseudo tokens of all requests whose prefill ends in a step, in as many passes as one of them needs.

    runner: vLLM's model runner, between ``execute_model`` and ``sample_tokens``
    """

    def __init__(self, runner: Any, pool: PagePool, layer_names: list[str], failures: Failures) -> None:
        self._runner = runner
        self._failures = failures
        self._pool = pool
        self._layer_names = layer_names
        self._vllm_config: VllmConfig = runner.vllm_config

    @cached_property
    def _end_tokens(self) -> torch.Tensor:
        # read only where a policy wants pseudo tokens: the generation config is a file
        return _end_tokens(self._vllm_config.model_config).to(self._pool.pages.device)

    def score(self, prefills: Sequence[PrefillGroup | PrefillRow], weights: ModelWeights) -> None:
        """Score what the pseudo tokens of these prompts attend to.

        All workers run the same passes, whatever a policy has raised on one of them.
        """
        rows = [row for prefill in prefills for row in prefill.rows]
        with self._failures.of([row.req_id for row in rows], "generating pseudo tokens"):
            for row, (pseudo, are_known) in zip(rows, self.run(rows, weights), strict=True):
                row.pseudo = pseudo
                self._failures.ask(row.req_id, "choosing what pseudo tokens see", _check, row, are_known)
        for layer in range(self._pool.num_layers):
            for prefill in prefills:
                look(prefill, self._failures, "scoring by pseudo tokens", partial(_score_ahead, layer, weights))
        for row in rows:  # which stay until the next step
            row.forget()

    def run(self, rows: list[PrefillRow], weights: ModelWeights) -> list[tuple[list[torch.Tensor], bool]]:
        """Return of each row the queries of its pseudo tokens, layer by layer [num_tokens, num_heads, head_size]; and
        whether the tokens that they see are the prompt's, as ``Eviction.are_known``.

        As many tokens as its policy asks for; fewer, but at least one, where the answer or the context ends. How many
        there are the host waits for, once for all rows.
        """
        start = perf_counter()
        device = self._pool.pages.device
        max_model_len = self._vllm_config.model_config.max_model_len
        most = [min(row.request.num_pseudo_tokens, max_model_len - row.kv_len) for row in rows]
        facts = np.array([[row.kv_len for row in rows], most, [row.end - 1 for row in rows]], dtype=np.int64)
        kv_lens, wanted, last = to_device(facts, device).unbind(0)
        decode = self._decode(rows)
        count, goes_on = torch.zeros_like(wanted), torch.ones_like(wanted, dtype=torch.bool)
        hidden = self._runner.execute_model_state.hidden_states[last]
        for number in range(max(most)):
            tokens = self._logits(hidden).argmax(dim=-1)
            if number:  # a single one is looked at even if it ends the answer
                goes_on &= ~torch.isin(tokens, self._end_tokens)
            count += goes_on & (number < wanted)
            hidden = self._pass(tokens, (kv_lens + number).clamp(max=max_model_len - 1), decode, weights)
        for row in rows:
            row.request.seconds += (perf_counter() - start) / len(rows)
        # of those that have failed, nothing is looked at
        known = [
            row.eviction.are_known if row.eviction is not None and row.request.req_id not in self._failures else None
            for row in rows
        ]
        are_known = torch.stack([goes_on.new_ones(()) if one is None else one for one in known])
        counts, flags = to_host(torch.stack([count, are_known.to(count.dtype)])).tolist()
        queries = [decode.queries(layer) for layer in range(self._pool.num_layers)]
        return [
            ([of_layer[index, :num_tokens] for of_layer in queries], bool(flag))
            for index, (num_tokens, flag) in enumerate(zip(counts, flags, strict=True))
        ]

    def _decode(self, rows: list[PrefillRow]) -> PseudoDecode:
        selected = [slots for row in rows for slots in self._selected(row)]
        most = max(slots.shape[1] for slots in selected)
        together = padded(selected, [most] * len(selected), dim=1, value=-1)
        return PseudoDecode(self._pool, together.unflatten(1, (len(rows), -1, most)).permute(2, 1, 0, 3))

    def _selected(self, row: PrefillRow) -> Sequence[torch.Tensor]:
        """Return per layer [num_kv_heads, num_selected]; the first token if the policy has failed.

        Such a request will end, but every worker must run the same batch.
        """
        if row.request.req_id not in self._failures:
            return row.selected
        return (self._pool.page_ids(row.block_ids[:1]) * self._pool.block_size).unbind()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._runner.model.compute_logits(hidden)
        return logits

    def _pass(
        self, tokens: torch.Tensor, positions: torch.Tensor, decode: PseudoDecode, weights: ModelWeights
    ) -> torch.Tensor:
        """Return [num_reqs, hidden_size]. Without slot mappings nothing is written to the cache."""
        metadata = {name: PseudoPassMetadata(decode, layer, weights) for layer, name in enumerate(self._layer_names)}
        with set_forward_context(metadata, self._vllm_config, num_tokens=len(tokens), slot_mapping={}):
            hidden: torch.Tensor = self._runner.model(
                input_ids=tokens.to(torch.int32), positions=positions, intermediate_tensors=None, inputs_embeds=None
            )
        return hidden


def _check(row: PrefillRow, are_known: bool) -> None:
    if not are_known:
        name = type(row.request.method.policy).__name__
        raise ValueError(f"{name}.preselect: expected tokens from 0 to {row.kv_len - 1}, got others")


def _score_ahead(layer: int, weights: ModelWeights, prefill: PrefillGroup | PrefillRow) -> None:
    prefill.score_ahead(layer, weights.scale(layer), weights.of(layer, prefill.rows[0].request.needs))


def _end_tokens(model: ModelConfig) -> torch.Tensor:
    """Return the tokens [*] that end an answer, by the model's own configuration."""
    found: set[int] = set()
    for ids in (getattr(model.hf_text_config, "eos_token_id", None), model.try_get_generation_config()):
        value = ids.get("eos_token_id") if isinstance(ids, dict) else ids
        if value is not None:
            found |= set(value) if isinstance(value, list) else {value}
    return torch.tensor(sorted(found), dtype=torch.int64)
