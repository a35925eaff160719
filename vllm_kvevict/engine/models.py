"""What a policy may ask of a model, and which of its layers are evicted, as far as vLLM's configuration says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm.config import ModelConfig, VllmConfig

from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.engine.fit import SlidingWindow
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.policies.base import EvictionPolicy, Need

# attribute of a front end's VllmConfig: by the name of a need, why the model does not show it
MISSING_NEEDS = "kvevict_missing_needs"
_CHUNKED = "chunked_attention"
_PARTIAL = "sliding_attention", _CHUNKED  # layer types of configurations
_DRAFT_PREFIX = "draft_model."


def split_draft_layers(layer_names: list[str]) -> tuple[list[str], list[str]]:
    """Return the layers of the model itself, and those of the draft model that vLLM loaded beside it."""
    draft = [name for name in layer_names if name.startswith(_DRAFT_PREFIX)]
    return [name for name in layer_names if name not in draft], draft


def check_needs(policy: str, needs: Iterable[Need], missing: Mapping[str, str]) -> None:
    """Raise ValueError if a policy, by its name, asks for something that a model does not show.

    missing: by the name of a need, why it does not
    """
    for need in needs:
        if need.name in missing:
            raise ValueError(
                f"kv_eviction: policy {policy!r} needs {need.value}, which this model does not show: "
                f"{missing[need.name]}. Choose a policy that does not need it"
            )


def missing_needs(vllm_config: VllmConfig) -> Mapping[str, str]:
    """Return what the model behind a front end does not show, as far as it has asked."""
    missing: Mapping[str, str] = vars(vllm_config).get(MISSING_NEEDS, {})
    return missing


def evicted_models(vllm_config: VllmConfig) -> list[ModelConfig]:
    """Return the model and its draft model, if it has one."""
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    return [vllm_config.model_config] if draft is None else [vllm_config.model_config, draft]


def windows_of(vllm_config: VllmConfig) -> tuple[SlidingWindow, ...]:
    """Return the groups that vLLM makes of layers that see a part of the context, as far as the configuration tells.

    A front end has no more than that. The engine counts the groups that there are, and ends what does not fit.
    """
    text_config, block_size = vllm_config.model_config.hf_text_config, vllm_config.cache_config.block_size
    kinds = list(getattr(text_config, "layer_types", None) or ())
    kinds = kinds[: len(kinds) - num_sharing(vllm_config.model_config)]  # which have no cache
    num_full, num_partial = kinds.count("full_attention"), max(map(kinds.count, _PARTIAL))
    if not (num_full and num_partial) or vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return ()
    num_seen = text_config.attention_chunk_size if _CHUNKED in kinds else text_config.sliding_window - 1
    if not num_seen:  # such layers see everything
        return ()
    least, most = sorted((num_full, num_partial))
    num_groups = cdiv(num_partial, most if most < 1.5 * least else least)
    return (SlidingWindow(num_seen + vllm_config.max_in_flight_tokens, block_size),) * num_groups


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
        "layers that share the keys and values of others": num_sharing(model) > 0,
    }
    for feature, is_on in unsupported.items():
        if is_on:
            raise ValueError(
                f"kv_eviction: policy {name!r} generates pseudo tokens, which does not work with {feature}; "
                f"choose another policy, 'laq_deferred' looks at the real answer"
            )


def num_sharing(model: ModelConfig) -> int:
    """Return how many layers, the last ones of a model, read the keys and values of others and have none."""
    return getattr(model.hf_text_config, "num_kv_shared_layers", None) or 0


def _sees_everything(model: ModelConfig) -> bool:
    config = model.hf_text_config
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return set(layer_types) <= {"attention", "full_attention"}
    return getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True)
