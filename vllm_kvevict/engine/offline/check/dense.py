"""The same model in plain transformers, with the evicted tokens masked: what the engine must compute."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

Store = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
_EAGER = "eager_attention_forward"  # a model's own attention, with its sinks, caps and scale


class DenseModel:
    """A causal LM whose later queries may see only a part of the prompt, another part in every layer and head.

    store:   what attention reads after a layer's keys and values [num_kv_heads, num_tokens, head_size] were written
    queries: of the last tokens, [num_tokens, num_heads, head_size] of each layer
    keys:    [num_kv_heads, num_tokens, head_size] of each layer

    Models whose modules do not let others compute their attention have no ``store``, ``queries`` and ``keys``.
    """

    def __init__(self, folder: Path, store: Store = lambda _, keys, values: (keys, values)) -> None:
        self._store = store
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(folder))]
        attention = "eager"
        if is_open := hasattr(sys.modules[model_class.__module__], _EAGER):
            attention = f"kvevict_dense_{id(self)}"  # a test may compare two of them
            AttentionInterface.register(attention, self._attention)
            AttentionMaskInterface.register(attention, _whole_mask)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        self.model.eval()
        if not is_open:
            for module in self.model.modules():
                if hasattr(module, "layer_idx"):
                    module.register_forward_pre_hook(self._masked, with_kwargs=True)
        self._kept: Iterator[torch.Tensor] | None = None
        self._kept_last = torch.empty(0)
        self._visible: Iterator[torch.Tensor] | None = None
        self.queries: list[torch.Tensor] = []
        self.keys: list[torch.Tensor] = []

    @torch.inference_mode()
    def logits(self, tokens: list[int], kept: torch.Tensor | None = None) -> torch.Tensor:
        """Return [num_tokens, vocab_size] float32.

        kept: [num_layers, num_kv_heads, num_prompt_tokens] bool for the layers with full attention; queries behind
              the prompt see only these of it. Other layers must see less of ``tokens`` than all.

        Raises ValueError if ``kept`` has more layers than have full attention.
        """
        self._kept, self._visible = None if kept is None else iter(kept), None
        logits = self._logits(tokens)
        if self._kept is not None and next(self._kept, None) is not None:
            raise ValueError("kept: expected a mask for each layer with full attention, got more")
        return logits

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
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **more: Any
    ) -> tuple[torch.Tensor, Any]:
        """query: [1, num_heads, num_tokens, head_size]; key, value: [1, num_kv_heads, num_tokens, head_size]."""
        keys, values = self._store(module.layer_idx, key[0], value[0])
        self.queries.append(query[0].transpose(0, 1))
        self.keys.append(keys)
        visible = self._seen(module, attention_mask[0, 0], len(keys)).repeat_interleave(query.shape[1] // len(keys), 0)
        attend = getattr(sys.modules[type(module).__module__], _EAGER)
        output: tuple[torch.Tensor, Any] = attend(module, query, keys[None], values[None], _added(visible), **more)
        return output

    def _masked(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Give a module that is about to run another mask."""
        mask = kwargs.get("attention_mask")
        if mask is None:
            return None
        heads = self.model.config.num_attention_heads
        visible = self._seen(module, mask[0, 0] == 0, 1)
        return args, kwargs | {"attention_mask": _added(visible.repeat_interleave(heads // len(visible), 0))}

    def _seen(self, module: Any, mask: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        """Return [num_kv_heads, num_tokens, num_tokens] bool, given what the model lets each query see."""
        visible = mask.expand(num_kv_heads, -1, -1)
        if not torch.equal(mask, torch.ones_like(mask).tril()):
            return visible  # a window or a chunk
        if self._visible is not None:
            return next(self._visible)
        if self._kept is None:
            return visible
        # layers that share keys and values read those of the last layer of their kind that has its own
        kept = self._kept_last if getattr(module, "is_kv_shared_layer", False) else next(self._kept)
        self._kept_last = kept
        visible = visible.expand(len(kept), -1, -1).clone()
        visible[:, kept.shape[1] :, : kept.shape[1]] &= kept[:, None]
        return visible


def _whole_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return [1, 1, num_tokens, num_tokens] bool, also where attention could do without."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _added(visible: torch.Tensor) -> torch.Tensor:
    """Return [1, num_heads, num_tokens, num_tokens] float32, to be added to the logits of attention."""
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None]
