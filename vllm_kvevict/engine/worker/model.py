"""What scoring must know of the model itself: the scales of an fp8 cache, how keys are rotated, and W_O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_kvevict.engine.models import check_needs
from vllm_kvevict.engine.worker.attention_parts import attention_parts
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.inputs import LayerWeights


class ModelWeights:
    """What stands around the attention layers of a loaded model, found once.

    missing: by the name of a need, why it cannot be handed to a policy
    """

    def __init__(
        self,
        model: nn.Module,
        layer_names: list[str],
        max_model_len: int,
        projections: dict[str, torch.Tensor] | None = None,
        targets: Mapping[str, str] | None = None,
    ) -> None:
        """max_model_len: the longest text, tokens
        projections: where copies of W_O are kept, by the names of their layers; None: each is made when asked for
        targets: of each layer that reads the keys and values of one of these, which one; None: there is none"""
        self._layer_names = layer_names
        targets = targets or {}
        parts_of_all = attention_parts(model, [*layer_names, *targets], max_model_len)
        self._parts, sharing = parts_of_all[: len(layer_names)], parts_of_all[len(layer_names) :]
        self._model = model
        self.projections = projections
        self._of_layers: dict[frozenset[Need], tuple[list[float], list[LayerWeights]]] = {}
        self._sinks: dict[int, torch.Tensor] = {}
        self.missing: dict[str, str] = {}
        for name, parts in zip(layer_names, self._parts, strict=True):
            for need, fault in parts.faults.items():
                self.missing.setdefault(need.name, f"of its layer {name} {fault}")
        for (name, target), parts in zip(targets.items(), sharing, strict=True):
            if parts.rotary is not self._parts[layer_names.index(target)].rotary:
                otherwise = f"queries are rotated otherwise than the keys of {target}, which it reads"
                fault = f"of its layer {name} {parts.faults.get(Need.ROTARY, otherwise)}"
                self.missing.setdefault(Need.ROTARY.name, fault)

    def check(self, policy: str, needs: Iterable[Need]) -> None:
        """Raise ValueError if the policy of that name asks for something that this model does not have."""
        check_needs(policy, needs, self.missing)

    def forget(self) -> None:
        """The model has new weights: what was read of the old ones is of no use any more."""
        self._of_layers.clear()
        self._sinks.clear()
        if self.projections is not None:
            self.projections.clear()

    def of(self, layer: int, needs: frozenset[Need]) -> LayerWeights:
        """Return what ``needs`` name of one layer, and the scales of its cache.

        W_O is in the model's dtype: vLLM's own on a GPU, unless it is quantised; else a copy as large as it. Of several
        tensor-parallel workers each has the columns of its own heads.
        """
        parts = self._parts[layer]
        rotary = parts.rotary if Need.ROTARY in needs else None
        projection = self._output_projection(layer) if Need.OUTPUT_PROJECTION in needs else None
        attention = parts.attention
        return LayerWeights(
            rotary,
            projection,
            attention._k_scale_float,
            attention._v_scale_float,
            float(attention.impl.logits_soft_cap or 0.0),
            self._sinks_of(layer),
        )

    def of_layers(self, needs: frozenset[Need]) -> tuple[list[float], list[LayerWeights]]:
        """Return the softmax scale of every layer, and what ``needs`` name of each."""
        if needs in self._of_layers:
            return self._of_layers[needs]
        layers = range(len(self._layer_names))
        of_each = [self.scale(layer) for layer in layers], [self.of(layer, needs) for layer in layers]
        if Need.OUTPUT_PROJECTION not in needs:  # which would be copies
            self._of_layers[needs] = of_each
        return of_each

    def makes_copies(self, needs: frozenset[Need]) -> bool:
        """Return whether ``of`` copies what ``needs`` name each time that it is asked."""
        if Need.OUTPUT_PROJECTION not in needs or self.projections is not None:
            return False
        return not _is_plain(self._parts[0].output_projection)

    def scale(self, layer: int) -> float:
        """Return the softmax scale of one layer."""
        return float(self._parts[layer].attention.impl.scale)

    def _sinks_of(self, layer: int) -> torch.Tensor | None:
        sinks = self._parts[layer].attention.impl.sinks
        if sinks is not None and layer not in self._sinks:
            self._sinks[layer] = sinks.detach().float().contiguous()
        return self._sinks.get(layer)

    def _output_projection(self, layer: int) -> torch.Tensor:
        linear, name = self._parts[layer].output_projection, self._layer_names[layer]
        if _is_plain(linear):
            weight: torch.Tensor = linear.weight
            return weight
        if self.projections is None:
            return self._copied(linear)
        if name not in self.projections:
            self.projections[name] = self._copied(linear)
        return self.projections[name]

    def _copied(self, linear: Any) -> torch.Tensor:
        size = getattr(linear, "input_size_per_partition", None) or linear.input_size  # of those that are not divided
        identity = torch.eye(size, dtype=next(self._model.parameters()).dtype, device=linear.weight.device)
        copy: torch.Tensor = linear.quant_method.apply(linear, identity).t()
        return copy


def _is_plain(linear: Any) -> bool:
    """Whether the weight of a layer is the matrix that it multiplies by; a CPU's is packed."""
    return type(linear.quant_method) is UnquantizedLinearMethod and linear.weight.device.type != "cpu"
