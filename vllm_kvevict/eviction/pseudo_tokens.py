"""Pseudo tokens: a few greedy tokens behind each of several prompts, for the sake of their queries.

They read what a policy has selected of each prompt, straight from its pages, and each other's keys and values, which
live beside the cache and go with this object. Nothing of the cache changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.kernels.paged import capped, softmax_with_sinks
from vllm_kvevict.policies.inputs import LayerWeights


@dataclass
class PseudoDecode:
    """Attention of the pseudo tokens of ``num_reqs`` prompts, one more token of each in every pass of the model.

    Scratch memory: for one layer at a time the keys and values of ``num_selected`` tokens of every prompt, twice in
    float32; for all layers 8 bytes for each of these tokens and head, and the pseudo tokens' own.

    pool:  the cache
    slots: [num_layers, num_reqs, num_kv_heads, num_selected] int64, what the pseudo tokens see of the prompts; -1
           behind those of a prompt that has fewer tokens selected in a layer than another one
    """

    pool: PagePool
    slots: torch.Tensor
    _keys: list[list[torch.Tensor]] = field(init=False)
    _values: list[list[torch.Tensor]] = field(init=False)
    _queries: list[list[torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        layers = range(self.pool.num_layers)
        self._keys, self._values, self._queries = [[] for _ in layers], [[] for _ in layers], [[] for _ in layers]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        weights: LayerWeights,
    ) -> torch.Tensor:
        """Return [num_reqs, num_heads, head_size], the attention of one pseudo token of every prompt in one layer.

        query:      [num_reqs, num_heads, head_size]
        key, value: [num_reqs, num_kv_heads, head_size]
        scale:      softmax scale
        """
        self._queries[layer].append(query.clone())
        self._keys[layer].append(key.clone())
        self._values[layer].append(value.clone())
        slots = self.slots[layer]
        is_selected = slots >= 0
        # one of the prompt's own, which is masked, stands in: others may be NaN
        stored_keys, stored_values = self.pool.gather(slots.where(is_selected, slots[..., :1].clamp(min=0)))
        keys = _with_own(stored_keys, weights.key_scale, self._keys[layer])
        values = _with_own(stored_values, weights.value_scale, self._values[layer])
        visible = torch.nn.functional.pad(is_selected[:, 0], (0, len(self._keys[layer])), value=True)
        # [num_reqs, num_kv_heads, group, num_tokens]
        logits = query.float().unflatten(1, (keys.shape[1], -1)) @ keys.transpose(2, 3) * scale
        logits = capped(logits, weights.softcap).masked_fill_(~visible[:, None, None], float("-inf"))
        sinks = None if weights.sinks is None else weights.sinks.view(1, keys.shape[1], -1)
        attended: torch.Tensor = (softmax_with_sinks(logits, sinks) @ values).flatten(1, 2)
        return attended.to(query.dtype)

    def queries(self, layer: int) -> torch.Tensor:
        """Return [num_reqs, num_tokens, num_heads, head_size], the queries of the pseudo tokens of every prompt."""
        return torch.stack(self._queries[layer], dim=1)


def _with_own(stored: torch.Tensor, scale: float, own: list[torch.Tensor]) -> torch.Tensor:
    """Return [num_reqs, num_kv_heads, num_tokens, head_size] float32: of the prompts, then of pseudo tokens."""
    return torch.cat([stored.float().mul_(scale), torch.stack(own, dim=2).float()], dim=2)
