"""How well the model predicts a prompt: the mean negative log-likelihood of a sample of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from vllm.lora.layers import LogitsProcessorWithLoRA

from vllm_kvevict.cache.staging import to_host
from vllm_kvevict.engine.worker.prefills import PrefillRow
from vllm_kvevict.engine.worker.watched import WatchedRequest

# every so many tokens one is looked at: the head of the model is a small part of a pass then
STRIDE = 16
# logits at once, [PIECE, vocab_size] in float32
PIECE = 128


class _Pair(NamedTuple):
    """A token, by its hidden state [hidden_size], that predicts the next one, by its id [1]."""

    hidden: torch.Tensor
    target: torch.Tensor


class PromptLikelihood:
    """Reads the logits of prompts that no one asked for, chunk by chunk, right after the model has run.

    Which tokens are looked at depends on their positions only, not on how a prompt is cut into chunks: the state of a
    chunk's last token waits for the next chunk.

    runner: vLLM's model runner, between ``execute_model`` and ``sample_tokens``
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def observe(self, rows: list[PrefillRow]) -> None:
        """Add to ``PrefillRow.request.likelihood`` what the chunks of this step say."""
        pairs = [self._pairs(row) for row in rows]
        flat = [pair for of_row in pairs for pair in of_row]
        if not flat:
            return
        hidden, targets = torch.stack([pair.hidden for pair in flat]), torch.cat([pair.target for pair in flat])
        parts = []
        for start in range(0, len(flat), PIECE):
            with _without_adapters(self._adapted):
                logits = self._runner.model.compute_logits(hidden[start : start + PIECE]).float()
            parts.append(_nll(logits, targets[start : start + PIECE].to(torch.int64)))
        of_rows = torch.cat(parts).split([len(of_row) for of_row in pairs])
        for row, nlls in zip(rows, of_rows, strict=True):
            row.request.likelihood.append(nlls)

    @cached_property
    def _adapted(self) -> list[LogitsProcessorWithLoRA]:
        return [module for module in self._runner.model.modules() if isinstance(module, LogitsProcessorWithLoRA)]

    def _pairs(self, row: PrefillRow) -> list[_Pair]:
        state, num_tokens = self._runner.execute_model_state, row.end - row.start
        batch = getattr(state, "input_batch", None)  # model runner V2
        ids = (self._runner.input_ids.gpu if batch is None else batch.input_ids)[row.start : row.end]
        hidden, first = state.hidden_states[row.start : row.end], row.kv_len - num_tokens
        pairs = []
        if row.request.waiting is not None:
            pairs.append(_Pair(row.request.waiting, ids[:1]))
            row.request.waiting = None
        for place in range((STRIDE // 2 - first) % STRIDE, num_tokens, STRIDE):
            if place + 1 < num_tokens:
                pairs.append(_Pair(hidden[place], ids[place + 1 : place + 2]))
            else:
                row.request.waiting = hidden[place].clone()
        return pairs


def mean_nlls(requests: Sequence[WatchedRequest]) -> list[float | None]:
    """Return the mean negative log-likelihood of the tokens of each, nats; None if none was looked at.

    The host waits once, for all of them.
    """
    counts = [sum(map(len, request.likelihood)) for request in requests]
    if not any(counts):
        return [None] * len(requests)
    nlls = to_host(torch.cat([of_chunk for request in requests for of_chunk in request.likelihood])).to(torch.float64)
    finite = [of_request[of_request.isfinite()] for of_request in nlls.split(counts)]
    return [float(of_request.mean()) if len(of_request) else None for of_request in finite]


class _NoAdapter:
    """Takes the place of what adds an adapter's part to logits."""

    def add_lora_logits(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        return logits


@contextmanager
def _without_adapters(heads: list[LogitsProcessorWithLoRA]) -> Iterator[None]:
    """Inside, these are what they are without an adapter.

    vLLM has noted whose adapter goes with which of the rows that it will sample from, and not with ours. The hidden
    states come from the adapted model all the same; adapters of the head itself are left out.
    """
    wrappers = [head.punica_wrapper for head in heads]
    for head in heads:
        head.punica_wrapper = _NoAdapter()
    try:
        yield
    finally:
        for head, wrapper in zip(heads, wrappers, strict=True):
            head.punica_wrapper = wrapper


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return [num_tokens] float32, nats; NaN where a target is no token of the vocabulary, such as that of an image.

    logits: [num_tokens, vocab_size] float32
    """
    is_token = (targets >= 0) & (targets < logits.shape[1])
    nll = torch.nn.functional.cross_entropy(logits, targets * is_token, reduction="none")
    return nll.masked_fill(~is_token, float("nan"))
