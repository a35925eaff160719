"""The same model in plain transformers, with the evicted tokens masked: what the engine must compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

Store = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class DenseModel:
    """A causal LM whose later queries may see only a part of the prompt, another part in every layer and head.

    store: what attention reads after a layer's keys and values [num_kv_heads, num_tokens, head_size] were written
    """

    def __init__(self, folder: Path, store: Store = lambda _, keys, values: (keys, values)) -> None:
        self._store = store
        attention = f"kvevict_dense_{id(self)}"  # a test may compare two of them
        AttentionInterface.register(attention, self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        self._kept: Iterator[torch.Tensor] | None = None
        self._visible: Iterator[torch.Tensor] | None = None
        self.queries: list[torch.Tensor] = []
        self.keys: list[torch.Tensor] = []

    @torch.inference_mode()
    def logits(self, tokens: list[int], kept: torch.Tensor | None = None) -> torch.Tensor:
        """Return [num_tokens, vocab_size] float32.

        kept: [num_layers, num_kv_heads, num_prompt_tokens] bool for the layers with full attention; queries behind
              the prompt see only these of it
        """
        self._kept, self._visible = None if kept is None else iter(kept), None
        return self._logits(tokens)

    @torch.inference_mode()
    def logits_of_visible(self, tokens: list[int], visible: torch.Tensor) -> torch.Tensor:
        """Return [num_tokens, vocab_size] float32.

        visible: [num_layers, num_kv_heads, num_tokens, num_tokens] bool, which keys each query sees
        """
        self._kept, self._visible = None, iter(visible)
        return self._logits(tokens)

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        self.queries, self.keys = [], []
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0]

    def _attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """query: [1, num_heads, num_tokens, head_size]; key, value: [1, num_kv_heads, num_tokens, head_size]."""
        keys, values = self._store(module.layer_idx, key[0], value[0])
        self.queries.append(query[0].transpose(0, 1))
        self.keys.append(keys)
        num_tokens = query.shape[2]
        visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril().expand(len(keys), -1, -1).clone()
        window = getattr(module, "sliding_window", None)
        kinds = getattr(module.config, "layer_types", None) or ()
        if window is not None:
            visible = visible.triu(1 - window)
        elif kinds and kinds[module.layer_idx] == "chunked_attention":
            chunk = torch.arange(num_tokens) // module.config.attention_chunk_size
            visible &= chunk[:, None] == chunk
        elif self._visible is not None:
            visible = next(self._visible)
        elif self._kept is not None:
            kept = next(self._kept)
            visible[:, kept.shape[1] :, : kept.shape[1]] &= kept[:, None]
        group = query.shape[1] // len(keys)
        visible = visible.repeat_interleave(group, 0)
        logits = query[0] @ keys.repeat_interleave(group, 0).transpose(1, 2) * module.scaling
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        return (weights @ values.repeat_interleave(group, 0)).transpose(0, 1)[None], None
