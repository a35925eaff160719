"""Lookahead Q-Cache offline, in plain transformers: prefill, SnapKV, greedy pseudo tokens, and scores at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM


@dataclass(frozen=True)
class LookaheadRun:
    """What the pseudo tokens of one prompt were and asked.

    tokens:         the pseudo tokens that were looked at
    prompt:         per layer, queries [num_heads, num_tokens, head_size] and keys [num_kv_heads, ...] of the prompt
    pseudo_queries: per layer [num_heads, len(tokens), head_size]
    """

    tokens: list[int]
    prompt: list[tuple[torch.Tensor, torch.Tensor]]
    pseudo_queries: list[torch.Tensor]

    def scores(self, window: int) -> torch.Tensor:
        """Return [num_layers, num_kv_heads, num_prompt_tokens - window] float32."""
        scores = []
        for (query, key), pseudo_query in zip(self.prompt, self.pseudo_queries, strict=True):
            num_tokens = key.shape[1]
            queries = torch.cat([query[:, num_tokens - window :], pseudo_query], dim=1)
            seen = torch.ones(queries.shape[1], num_tokens, dtype=torch.bool)
            seen[:window] = seen[:window].tril(num_tokens - window)
            sums = _attention(queries, key, seen).sum(dim=1).unflatten(0, (len(key), -1)).mean(dim=1)
            scores.append(F.max_pool1d(sums[:, : num_tokens - window], 7, stride=1, padding=3))
        return torch.stack(scores)


class LookaheadModel:
    """One prompt at a time; every step is computed on its own, from keys and values that it keeps itself."""

    def __init__(self, folder: Path, first_window: int = 32, end_tokens: tuple[int, ...] = ()) -> None:
        name = f"kvevict_lookahead_{id(self)}"
        AttentionInterface.register(name, self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=name)
        self._first_window = first_window
        self._end_tokens = end_tokens
        self._prompt: list[Any] = []
        self._seen: list[list[tuple[torch.Tensor, torch.Tensor]]] | None = None
        self._queries: list[torch.Tensor] = []

    @torch.inference_mode()
    def run(self, prompt: list[int], capacity: int) -> LookaheadRun:
        """capacity: tokens of the cheap cache."""
        self._prompt, self._seen, self._queries = [], None, []
        logits = self._logits(prompt, 0)
        layers, num_tokens = self._prompt, len(prompt)
        self._seen = [self._cheap_cache(*layer, capacity) for layer in layers]
        tokens = []
        for number in range(8):
            token = int(logits.argmax())
            if number and token in self._end_tokens:
                break
            tokens.append(token)
            logits = self._logits([token], num_tokens + number)
        pseudo_queries = [torch.cat(self._queries[index :: len(layers)], dim=1) for index in range(len(layers))]
        return LookaheadRun(tokens, [(query, key) for query, key, _ in layers], pseudo_queries)

    def _logits(self, tokens: list[int], first_position: int) -> torch.Tensor:
        positions = torch.arange(first_position, first_position + len(tokens))[None]
        return self.model(torch.tensor([tokens]), position_ids=positions, use_cache=False).logits[0, -1]

    def _attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """query: [1, num_heads, num_tokens, head_size]; key, value: [1, num_kv_heads, num_tokens, head_size]."""
        query, key, value = query[0], key[0], value[0]
        if self._seen is None:
            self._prompt.append((query, key, value))
            seen = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).tril()
        else:
            self._queries.append(query)
            old_key, old_value = self._seen[module.layer_idx]
            key, value = torch.cat([old_key, key], dim=1), torch.cat([old_value, value], dim=1)
            self._seen[module.layer_idx] = (key, value)
            seen = torch.ones(1, key.shape[1], dtype=torch.bool)
        output = _attention(query, key, seen) @ value.repeat_interleave(len(query) // len(value), 0)
        return output.transpose(0, 1)[None], None

    def _cheap_cache(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SnapKV by its formula; [num_kv_heads, capacity, head_size] each."""
        window, num_tokens = self._first_window, key.shape[1]
        seen = torch.ones(window, num_tokens, dtype=torch.bool).tril(num_tokens - window)
        sums = _attention(query[:, -window:], key, seen).sum(dim=1).unflatten(0, (len(key), -1)).mean(dim=1)
        pooled = F.max_pool1d(sums[:, : num_tokens - window], 7, stride=1, padding=3)
        best = pooled.argsort(dim=1, descending=True, stable=True)[:, : capacity - window]
        last = torch.arange(num_tokens - window, num_tokens).expand(len(key), -1)
        kept = torch.cat([best, last], dim=1)[..., None].expand(-1, -1, key.shape[2])
        return key.gather(1, kept), value.gather(1, kept)


def _attention(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return [num_heads, num_queries, num_keys], the softmax."""
    logits = query @ key.repeat_interleave(len(query) // len(key), 0).transpose(1, 2) * query.shape[2] ** -0.5
    return logits.masked_fill(~seen, float("-inf")).softmax(-1)


def check_kept(scores: torch.Tensor, kept: torch.Tensor) -> None:
    """Assert that every head has kept the highest scores; of pooled neighbours that tie, any.

    scores: [num_layers, num_kv_heads, num_judged]
    kept:   [num_layers, num_kv_heads, num_prompt_tokens] bool
    """
    num_judged = scores.shape[2]
    assert kept[..., num_judged:].all()
    for of_head, stays in zip(scores.flatten(0, 1), kept[..., :num_judged].flatten(0, 1), strict=True):
        cut = of_head.topk(int(stays.sum()))
        best = torch.zeros_like(stays).index_fill(0, cut.indices, True)
        swapped = of_head[best != stays]
        torch.testing.assert_close(swapped, cut.values[-1:].expand_as(swapped), rtol=1e-4, atol=0)
