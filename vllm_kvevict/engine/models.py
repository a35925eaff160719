"""What a policy may ask of a model, and which of its layers are evicted, as far as vLLM's configuration says."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.config import ModelConfig, VllmConfig

from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.engine.fit import SlidingWindow
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.policies.base import EvictionPolicy, Need

# models whose attention modules hold `rotary_emb` and `o_proj` and rotate every layer
_KNOWN_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
_DRAFT_PREFIX = "draft_model."


def split_draft_layers(layer_names: list[str]) -> tuple[list[str], list[str]]:
    """Return the layers of the model itself, and those of the draft model that vLLM loaded beside it."""
    draft = [name for name in layer_names if name.startswith(_DRAFT_PREFIX)]
    return [name for name in layer_names if name not in draft], draft


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


def windows_of(vllm_config: VllmConfig) -> tuple[SlidingWindow, ...]:
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
    window = SlidingWindow(text_config.sliding_window - 1 + vllm_config.max_in_flight_tokens, block_size)
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


def check_pseudo_tokens(name: str, policy: EvictionPolicy, vllm_config: VllmConfig) -> None:
    """Raise ValueError if the policy ``name`` wants pseudo tokens that the model or the engine cannot give it."""
    if not traits_of(policy).num_pseudo_tokens:
        return
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    unsupported = {
        "speculative decoding, whose draft model has no part in it": vllm_config.speculative_config is not None,
        "LoRA adapters": vllm_config.lora_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism of a mixture of experts": parallel.data_parallel_size > 1 and model.is_moe,
        "multimodal models": model.is_multimodal_model or model.uses_mrope,
        "layers that see a part of the context only": not _sees_everything(model),
    }
    for feature, is_on in unsupported.items():
        if is_on:
            raise ValueError(
                f"kv_eviction: policy {name!r} generates pseudo tokens, which does not work with {feature}; "
                f"choose another policy, 'laq_deferred' looks at the real answer"
            )


def _sees_everything(model: ModelConfig) -> bool:
    config = model.hf_text_config
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return set(layer_types) <= {"attention", "full_attention"}
    return getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True)
