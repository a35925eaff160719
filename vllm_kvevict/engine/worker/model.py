"""What scoring must know of the model itself: the scales of an fp8 cache, how keys are rotated, and W_O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig

from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.engine.fit import Window
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies.base import EvictionPolicy, LayerWeights, Need

# models whose attention modules hold `rotary_emb` and `o_proj` and rotate every layer
_KNOWN_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)


def check_needs(name: str, policy: EvictionPolicy, models: Sequence[ModelConfig]) -> None:
    """Raise ValueError if the policy ``name`` asks for something of one of these models that we cannot hand to it."""
    asked = [need for need in (Need.ROTARY, Need.OUTPUT_PROJECTION) if need in traits_of(policy).needs]
    if asked:
        for model_config in models:
            _check_needs(name, asked, model_config)


def evicted_models(vllm_config: VllmConfig) -> list[ModelConfig]:
    """Return the model and its draft model, if it has one."""
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    return [vllm_config.model_config] if draft is None else [vllm_config.model_config, draft]


def windows_of(vllm_config: VllmConfig) -> tuple[Window, ...]:
    """Return the groups that vLLM makes of the layers with a sliding window, as far as the configuration tells.

    A front end has no more than that. The engine counts the groups that there are, and ends what does not fit.
    """
    text_config, block_size = vllm_config.model_config.hf_text_config, vllm_config.cache_config.block_size
    kinds = list(getattr(text_config, "layer_types", None) or ())
    num_full, num_sliding = kinds.count("full_attention"), kinds.count("sliding_attention")
    if not (num_full and num_sliding) or vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return ()
    least, most = sorted((num_full, num_sliding))
    num_groups = cdiv(num_sliding, most if most < 1.5 * least else least)
    window = Window(text_config.sliding_window - 1 + vllm_config.max_in_flight_tokens, block_size)
    return (window,) * num_groups


def _check_needs(name: str, asked: Sequence[Need], model_config: ModelConfig) -> None:
    text_config = model_config.hf_text_config
    if not set(model_config.architectures) & set(_KNOWN_ARCHITECTURES):
        found = ", ".join(model_config.architectures)
    elif model_config.uses_mrope:
        found = "a model with multimodal rotary embeddings"
    elif getattr(text_config, "dual_chunk_attention_config", None) is not None:
        found = "a model with dual chunk attention"
    else:
        return
    raise ValueError(
        f"kv_eviction: policy {name!r} needs {' and '.join(need.value for need in asked)}, which is known for "
        f"{', '.join(_KNOWN_ARCHITECTURES)}; got {found}. Choose a policy that does not need it"
    )


class ModelWeights:
    """The modules around the attention layers of a loaded model; what is asked for is found once and kept."""

    def __init__(self, model: nn.Module, layer_names: list[str]) -> None:
        self._model = model
        self._layer_names = layer_names
        self._attention_modules: list[tuple[Any, Any]] = []
        self._projections: dict[int, torch.Tensor] = {}

    def of(self, layer: int, needs: frozenset[Need]) -> LayerWeights:
        """Return what ``needs`` name of one layer, and the scales of its cache.

        W_O is a copy in the model's dtype, as large as the weight itself: vLLM's own may be packed or quantised. Of
        several tensor-parallel workers each has the columns of its own heads.
        """
        rotary = self._rotary(layer) if Need.ROTARY in needs else None
        projection = self._output_projection(layer) if Need.OUTPUT_PROJECTION in needs else None
        _, attention = self._modules(layer)
        return LayerWeights(rotary, projection, attention._k_scale_float, attention._v_scale_float)

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
        if layer not in self._projections:
            linear = self._modules(layer)[0].o_proj
            dtype = next(self._model.parameters()).dtype
            identity = torch.eye(linear.input_size_per_partition, dtype=dtype, device=linear.weight.device)
            self._projections[layer] = linear.quant_method.apply(linear, identity).t()
        return self._projections[layer]
