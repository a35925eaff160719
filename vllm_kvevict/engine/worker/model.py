"""What scoring must know of the model itself: the scales of an fp8 cache, how keys are rotated, and W_O."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.inputs import LayerWeights


class ModelWeights:
    """The modules around the attention layers of a loaded model, found once."""

    def __init__(
        self, model: nn.Module, layer_names: list[str], projections: dict[str, torch.Tensor] | None = None
    ) -> None:
        """projections: where copies of W_O are kept, by the names of their layers; None: each is made when asked for"""
        self._model = model
        self._layer_names = layer_names
        self._attention_modules: list[tuple[Any, Any]] = []
        self._projections = projections
        self._of_layers: dict[frozenset[Need], tuple[list[float], list[LayerWeights]]] = {}

    def of(self, layer: int, needs: frozenset[Need]) -> LayerWeights:
        """Return what ``needs`` name of one layer, and the scales of its cache.

        W_O is in the model's dtype: vLLM's own on a GPU, unless it is quantised; else a copy as large as it. Of several
        tensor-parallel workers each has the columns of its own heads.
        """
        rotary = self._rotary(layer) if Need.ROTARY in needs else None
        projection = self._output_projection(layer) if Need.OUTPUT_PROJECTION in needs else None
        _, attention = self._modules(layer)
        return LayerWeights(rotary, projection, attention._k_scale_float, attention._v_scale_float)

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
        if Need.OUTPUT_PROJECTION not in needs or self._projections is not None:
            return False
        return not _is_plain(self._modules(0)[0].o_proj)

    def scale(self, layer: int) -> float:
        """Return the softmax scale of one layer."""
        return float(self._modules(layer)[1].impl.scale)

    def _modules(self, layer: int) -> tuple[Any, Any]:
        """Return the module around an attention layer, and the attention layer itself."""
        if not self._attention_modules:
            found = {
                str(child.layer_name): (module, child)
                for module in self._model.modules()
                for child in module.children()
                if hasattr(child, "layer_name")
            }
            self._attention_modules = [found[name] for name in self._layer_names]
        return self._attention_modules[layer]

    def _rotary(self, layer: int) -> Rotary:
        embedding = self._modules(layer)[0].rotary_emb
        return Rotary(embedding.cos_sin_cache, embedding.is_neox_style)

    def _output_projection(self, layer: int) -> torch.Tensor:
        linear, name = self._modules(layer)[0].o_proj, self._layer_names[layer]
        if _is_plain(linear):
            weight: torch.Tensor = linear.weight
            return weight
        if self._projections is None:
            return self._copied(linear)
        if name not in self._projections:
            self._projections[name] = self._copied(linear)
        return self._projections[name]

    def _copied(self, linear: Any) -> torch.Tensor:
        dtype = next(self._model.parameters()).dtype
        identity = torch.eye(linear.input_size_per_partition, dtype=dtype, device=linear.weight.device)
        copy: torch.Tensor = linear.quant_method.apply(linear, identity).t()
        return copy


def _is_plain(linear: Any) -> bool:
    """Whether the weight of a layer is the matrix that it multiplies by; a CPU's is packed."""
    return type(linear.quant_method) is UnquantizedLinearMethod and linear.weight.device.type != "cpu"
