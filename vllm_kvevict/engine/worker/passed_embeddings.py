"""Models that vLLM takes from transformers: their attention modules run a batch, and are handed cosines and sines."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vllm_kvevict.kernels.rotary import Rotary

PASSED = "position_embeddings"  # the argument
_MASK = "attention_mask"  # has every such module
_Table = tuple[torch.Tensor, torch.Tensor]


class PassedEmbeddings:
    """The rotary embedding of a model that computes it once, and whose attention modules are handed the result."""

    def __init__(self, model: nn.Module, max_model_len: int) -> None:
        """max_model_len: the longest text, tokens

        Raises nothing: a model may have no such embedding, or several, of which nobody knows who is given which."""
        self.max_model_len = max_model_len
        self._embeddings = [module for module in model.modules() if _is_embedding(module)]
        self._tables: dict[str | None, list[Rotary]] = {}

    def arguments(self, module: nn.Module, positions: torch.Tensor, hidden: torch.Tensor) -> dict[str, Any]:
        """Return those of an attention module's forward for tokens at ``positions``.

        Raises ValueError if there is no one embedding for them.
        """
        given: dict[str, Any] = {"hidden_states": hidden[None], _MASK: None}
        if PASSED in _parameters(module):
            given[PASSED] = self._cos_sin(module, positions, hidden)
        return given

    def rotaries(self, module: nn.Module) -> Iterator[Rotary]:
        """Return what the embedding may be at every position of the longest text; nothing if the module is handed none.

        One that depends on the length of the text is another one in a short text, and will not do.
        """
        if not is_of_transformers(module) or PASSED not in _parameters(module):
            return
        kind = _kind_of(module)
        if kind not in self._tables:
            device = next(module.parameters()).device
            positions = torch.arange(self.max_model_len, device=device)
            whole = self._cos_sin(module, positions, torch.zeros(1, 1, device=device))
            cos, sin = (table[0].float() for table in whole)
            half = cos.shape[-1] // 2
            tables = [torch.cat([cos[:, :half], sin[:, :half]], dim=-1), torch.cat([cos[:, ::2], sin[:, ::2]], dim=-1)]
            self._tables[kind] = [Rotary(table, is_neox_style) for table in tables for is_neox_style in (True, False)]
        yield from self._tables[kind]

    def _cos_sin(self, module: nn.Module, positions: torch.Tensor, hidden: torch.Tensor) -> _Table:
        if len(self._embeddings) != 1:
            raise ValueError(f"it asks for {PASSED}, and the model has {len(self._embeddings)} that may be meant")
        # of a copy: a long text changes the frequencies of some for good
        embedding, kind = copy.deepcopy(self._embeddings[0]), _kind_of(module)
        more = {} if "layer_type" not in _parameters(embedding) else {"layer_type": kind}
        cos_sin: _Table = embedding(hidden[None], positions[None], **more)
        return cos_sin


def is_of_transformers(module: nn.Module) -> bool:
    """Whether an attention module takes what those of transformers take."""
    return {"hidden_states", _MASK} <= {*_parameters(module)}


def _parameters(module: nn.Module) -> list[str]:
    return [*inspect.signature(module.forward).parameters]


def _is_embedding(module: nn.Module) -> bool:
    has_frequencies = any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))
    return has_frequencies and _parameters(module)[:2] == ["x", "position_ids"]


def _kind_of(module: nn.Module) -> str | None:
    """Return the type of a module's layer, of which each may have frequencies of its own."""
    config: Any = module.config
    kinds = getattr(config, "layer_types", None)
    return None if kinds is None else str(kinds[module.layer_idx])
