"""Families of models, and of each a tiny random one: built by its own class in transformers, in seconds, float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 512
_BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_WINDOWS = {
    "num_hidden_layers": 4,
    "sliding_window": 48,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_ONE_LESS = {"sliding_window": 47}  # of these models vLLM lets a window see one token more than transformers
_HEAD = {"head_dim": 32}
_TIED = {"tie_word_embeddings": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GRANITE = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
# what vLLM asks for Llama 4 only, of which transformers scales queries at any length
SETTINGS = {"override_generation_config": {"attn_temperature_tuning": True}}
# beside the logits of the keys of gpt-oss: about half of the mass, another part in every head
_SINKS = 12.0


@dataclass(frozen=True)
class Family:
    """One class of models.

    name:      what people call it
    kind:      its ``model_type`` in transformers
    mechanism: what is peculiar about its attention
    fields:    of its configuration, beside those of every family
    overrides: fields that have another value for vLLM than for transformers
    """

    name: str
    kind: str
    mechanism: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """Return the configuration of the tiny model."""
        return CONFIG_MAPPING[self.kind](**{**_BASE, **self.fields})

    def build(self, folder: Path) -> None:
        """Save the tiny model."""
        torch.manual_seed(0)
        config = self.config()
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                _fill(name, weight)
        model.save_pretrained(folder)


def _fill(name: str, weight: nn.Parameter) -> None:
    """Make a weight random, so that attention is sharp, and no two heads, layers or norms are alike."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if "sink" in name:
        weight.normal_(_SINKS, 1.5)
    elif kind in ("alpha_p", "alpha_n"):  # of Apertus' activation, which vLLM rounds to bfloat16: 0 is exact
        weight.fill_(-30.0)
    elif "correction_bias" in name:  # of a choice of experts, which vLLM's CPU router leaves out
        weight.zero_()
    elif weight.dim() >= 2 and ("embed" in name or kind in ("wte", "wpe", "embeddings")):
        weight.normal_(0.0, 0.5)
    elif weight.dim() >= 2:
        sharp = any(part in kind for part in ("q_proj", "k_proj", "qkv", "query_key_value", "c_attn", "Wqkv"))
        weight.normal_(0.0, (1.5 if sharp else 1.0) * weight.shape[-1] ** -0.5)
    elif "norm" in name or "ln_" in name or "layernorm" in name:
        sharp = any(part in name for part in ("q_norm", "k_norm", "query_layernorm", "key_layernorm"))
        weight.add_(0.2 * torch.randn_like(weight) + (0.5 if sharp else 0.0))
    elif name.endswith("bias"):
        weight.normal_(0.0, 0.2)


FAMILIES = [
    Family("Llama", "llama", "grouped heads"),
    Family("Qwen2", "qwen2", "biases of queries, keys and values"),
    Family("Qwen3", "qwen3", "norms of queries and keys", _HEAD),
    Family("Qwen2-MoE", "qwen2_moe", "mixture of experts", {**_EXPERTS, "shared_expert_intermediate_size": 64}),
    Family("Qwen3-MoE", "qwen3_moe", "norms of queries and keys; mixture of experts", {**_EXPERTS, **_HEAD}),
    Family(
        "gpt-oss",
        "gpt_oss",
        "attention sinks; sliding windows; mixture of experts",
        {**_WINDOWS, **_HEAD, **_LOCAL_EXPERTS, "intermediate_size": 64},
    ),
    Family("Gemma", "gemma", "scaled embeddings", {**_HEAD, **_TIED}),
    Family(
        "Gemma 2",
        "gemma2",
        "soft-capping; sliding windows",
        {**_WINDOWS, **_HEAD, **_TIED, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    ),
    Family(
        "Gemma 3",
        "gemma3_text",
        "sliding windows; two rotary bases; norms of queries and keys",
        {**_WINDOWS, **_HEAD, **_TIED, "query_pre_attn_scalar": 24},
    ),
    Family(
        "Gemma 3n",
        "gemma3n_text",
        "layers that share keys and values; sliding windows",
        {
            **_HEAD,
            **_TIED,
            "num_hidden_layers": 6,
            "sliding_window": 48,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "intermediate_size": [256] * 6,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 16,
            "activation_sparsity_pattern": [0.0] * 6,
        },
    ),
    Family(
        "Gemma 4",
        "gemma4_text",
        "sliding windows; wider heads and partial rotary embedding in full layers",
        {
            **_WINDOWS,
            **_HEAD,
            **_TIED,
            "global_head_dim": 64,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 32,
        },
    ),
    Family(
        "Gemma 4 E2B",
        "gemma4_text",
        "layers that share keys and values; sliding windows; wider heads in full layers",
        {
            **_HEAD,
            **_TIED,
            "num_hidden_layers": 8,
            "num_kv_shared_layers": 4,
            "sliding_window": 48,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
            "global_head_dim": 64,
            "use_double_wide_mlp": True,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 32,
        },
    ),
    Family(
        "Llama 4",
        "llama4_text",
        "chunked attention; full layers without rotary embedding; mixture of experts",
        {
            **_HEAD,
            **_LOCAL_EXPERTS,
            "num_hidden_layers": 4,
            "num_experts_per_tok": 1,
            "intermediate_size": 64,
            "intermediate_size_mlp": 256,
            "attention_chunk_size": 64,
            "no_rope_layers": [1, 0, 1, 0],
            "floor_scale": 64,
        },
    ),
    Family("Mistral", "mistral", "grouped heads", {**_HEAD, "sliding_window": None}),
    Family(
        "Ministral 3",
        "ministral3",
        "queries scaled by position; YaRN",
        {
            **_HEAD,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 128,
                "max_position_embeddings": 2048,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            # where vLLM looks for it
            "llama_4_scaling": {"original_max_position_embeddings": 128, "beta": 0.1},
        },
    ),
    Family("Mixtral", "mixtral", "mixture of experts", {**_LOCAL_EXPERTS, **_HEAD}),
    Family("Phi-1 and 2", "phi", "partial rotary embedding", {"partial_rotary_factor": 0.5}),
    Family("Phi-3 and 4", "phi3", "projections in one"),
    Family(
        "Phi-MoE",
        "phimoe",
        "biases; mixture of experts",
        {**_LOCAL_EXPERTS, "attention_bias": True, "lm_head_bias": True},
        overrides={"architectures": ["PhiMoEForCausalLM"]},
    ),
    Family("GLM", "glm", "partial rotary embedding of neighbours", _HEAD),
    Family("GLM-4", "glm4", "partial rotary embedding of neighbours", _HEAD),
    Family(
        "GLM-4-MoE",
        "glm4_moe",
        "partial rotary embedding; norms of queries and keys; mixture of experts",
        {
            **_HEAD,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "use_qk_norm": True,
            "num_nextn_predict_layers": 0,
        },
    ),
    Family("Granite", "granite", "a softmax scale of its own", _GRANITE),
    Family(
        "Granite-MoE",
        "granitemoe",
        "a softmax scale of its own; mixture of experts",
        {**_GRANITE, **_LOCAL_EXPERTS},
    ),
    Family(
        "Granite-MoE with a shared expert",
        "granitemoeshared",
        "a softmax scale of its own; mixture of experts",
        {**_GRANITE, **_LOCAL_EXPERTS, "shared_intermediate_size": 64},
    ),
    Family("OLMo", "olmo", "norms without weights"),
    Family("OLMo 2", "olmo2", "norms of whole queries and keys, behind the layers"),
    Family("OLMo 3", "olmo3", "sliding windows; norms of whole queries and keys", _WINDOWS),
    Family(
        "OLMoE", "olmoe", "norms of whole queries and keys; mixture of experts", {**_EXPERTS, "intermediate_size": 64}
    ),
    Family("EXAONE 4", "exaone4", "sliding windows; no rotary embedding in full layers", {**_WINDOWS, **_HEAD}),
    Family(
        "EXAONE-MoE",
        "exaone_moe",
        "sliding windows; no rotary embedding in full layers; mixture of experts",
        {**_WINDOWS, **_HEAD, **_EXPERTS},
    ),
    Family(
        "MiniMax-M2",
        "minimax_m2",
        "partial rotary embedding; norms of whole queries and keys; mixture of experts",
        {
            **_HEAD,
            **_LOCAL_EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size": 64,
            "rotary_dim": 16,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
        },
        # vLLM routes by a sigmoid on a GPU only; the best expert is the same, and its weight is 1
        overrides={"scoring_func": "softmax"},
    ),
    Family("Falcon", "falcon", "new decoder: grouped heads", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Family("GPT-2", "gpt2", "learned positions; one KV head per head", {"num_key_value_heads": 4}),
    Family("GPT-J", "gptj", "partial rotary embedding of neighbours", {"rotary_dim": 16, "num_key_value_heads": 4}),
    Family("GPT-NeoX", "gpt_neox", "partial rotary embedding; projections in one", {"num_key_value_heads": 4}),
    Family("GPTBigCode", "gpt_bigcode", "learned positions; one KV head", {"num_key_value_heads": 1}),
    Family("OPT", "opt", "learned positions", {"ffn_dim": 256, "word_embed_proj_dim": 128, "num_key_value_heads": 4}),
    Family("BLOOM", "bloom", "ALiBi", {**_TIED, "num_key_value_heads": 4}),
    Family("StarCoder2", "starcoder2", "biases", {"sliding_window": None}),
    Family("StableLM", "stablelm", "partial rotary embedding", {"use_qkv_bias": True}),
    Family(
        "Command-R",
        "cohere",
        "rotary embedding of neighbours; norms of queries and keys",
        {"use_qk_norm": True, **_TIED, "logit_scale": 0.5},
    ),
    Family(
        "Command-R 7B",
        "cohere2",
        "sliding windows; no rotary embedding in full layers",
        {**_WINDOWS, **_HEAD, **_TIED, "logit_scale": 0.5},
        overrides=_ONE_LESS,
    ),
    Family(
        "Command-A-MoE",
        "cohere2_moe",
        "sliding windows; no rotary embedding in full layers; mixture of experts",
        {**_WINDOWS, **_HEAD, **_EXPERTS, **_TIED, "logit_scale": 0.5},
        overrides=_ONE_LESS,
    ),
    Family(
        "DBRX",
        "dbrx",
        "clipped queries and keys; mixture of experts",
        {
            "d_model": 128,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 2048,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    Family("Nemotron", "nemotron", "partial rotary embedding", _HEAD),
    Family("Seed-OSS", "seed_oss", "biases", _HEAD),
    Family("ERNIE 4.5", "ernie4_5", "rotary embedding of neighbours", _HEAD),
    Family(
        "ERNIE 4.5-MoE",
        "ernie4_5_moe",
        "rotary embedding of neighbours; mixture of experts",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
        },
    ),
    Family("SmolLM3", "smollm3", "layers without rotary embedding", {"no_rope_layers": [1, 0, 1]}),
    Family("Arcee", "arcee", "grouped heads", _HEAD),
    Family("Apertus", "apertus", "norms of queries and keys; scaled rotary embedding"),
    Family("Hunyuan", "hunyuan_v1_dense", "norms of queries and keys behind the rotation", _HEAD),
    Family(
        "Hunyuan-MoE",
        "hunyuan_v1_moe",
        "norms of queries and keys behind the rotation; mixture of experts",
        {**_HEAD, "num_experts": 4, "moe_topk": 2, "intermediate_size": 64},
    ),
    Family(
        "Hunyuan 3",
        "hy_v3",
        "norms of queries and keys; mixture of experts",
        {
            **_HEAD,
            **_EXPERTS,
            "num_shared_experts": 1,
            "num_nextn_predict_layers": 0,
            # which vLLM asks for
            "expert_hidden_dim": 64,
            "first_k_dense_replace": 1,
            "route_norm": True,
            "qk_norm": True,
        },
    ),
    Family("HyperCLOVA X", "hyperclovax", "a softmax scale of its own", {**_HEAD, **_GRANITE}),
    Family(
        "Laguna",
        "laguna",
        "sliding windows; output gates; partial rotary embedding; mixture of experts",
        {**_WINDOWS, **_HEAD, **_EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    Family(
        "AFMoE",
        "afmoe",
        "sliding windows; output gates; no rotary embedding in full layers; mixture of experts",
        {
            **_WINDOWS,
            **_HEAD,
            **_EXPERTS,
            "num_shared_experts": 1,
            # which vLLM asks for
            "score_func": "sigmoid",
            "route_norm": True,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Family(
        "MiMo-V2",
        "mimo_v2_flash",
        "values narrower than keys; sliding windows with sinks; mixture of experts",
        {
            **_WINDOWS,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "head_dim": 64,
            "v_head_dim": 32,
            # which vLLM asks for
            "hybrid_layer_pattern": [1, 0, 1, 0],
            "moe_layer_freq": [0, 1, 1, 1],
            "layernorm_epsilon": 1e-6,
            "sliding_window_size": 48,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 64,
            "swa_v_head_dim": 32,
            "add_swa_attention_sink_bias": True,
        },
    ),
    Family(
        "HRM-Text",
        "hrm_text",
        "one layer run several times",
        {**_HEAD, "num_key_value_heads": 4, "num_layers_per_stack": 2, "prefix_lm": False},
    ),
    Family("CWM", "cwm", "sliding windows; scaled rotary embedding", {**_WINDOWS, **_HEAD}),
    Family(
        "FlexOlmo",
        "flex_olmo",
        "norms of whole queries and keys; mixture of experts",
        {**_EXPERTS, "intermediate_size": 64},
    ),
    Family("Jais 2", "jais2", "biases", _HEAD),
    Family(
        "Mellum", "mellum", "sliding windows; two rotary bases; mixture of experts", {**_WINDOWS, **_HEAD, **_EXPERTS}
    ),
    Family(
        "VaultGemma",
        "vaultgemma",
        "soft-capping; sliding windows",
        {**_WINDOWS, **_HEAD, **_TIED, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    ),
    Family("Helium", "helium", "rotary embedding of neighbours", _HEAD),
    Family(
        "Solar-Open",
        "solar_open",
        "grouped heads; mixture of experts",
        {**_HEAD, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    # what follows is not in transformers: the model of a relative, whose weights have the same names
    Family("MiMo", "qwen2", "biases of queries, keys and values", overrides={"architectures": ["MiMoForCausalLM"]}),
    Family(
        "TeleFLM", "llama", "grouped heads", {"use_mup": False}, overrides={"architectures": ["TeleFLMForCausalLM"]}
    ),
    Family(
        "MiniCPM",
        "granite",
        "scaled embeddings and residuals",
        {
            "embedding_multiplier": 2.0,
            "attention_multiplier": 32**-0.5,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "scale_emb": 2.0,
            "scale_depth": 0.5 * 3**0.5,
            "dim_model_base": 64,
        },
        overrides={"architectures": ["MiniCPMForCausalLM"]},
    ),
    Family(
        "Orion",
        "stablelm",
        "grouped heads",
        {
            "partial_rotary_factor": 1.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            "rms_norm_eps": 1e-5,
        },
        overrides={"architectures": ["OrionForCausalLM"]},
    ),
    Family(
        "Solar",
        "llama",
        "grouped heads; without its skip connections",
        {"bskcn_tv": [0.9, 0.8], "bskcn_1": [], "bskcn_2": [], "bskcn_3": [], "bskcn_4": []},
        overrides={"architectures": ["SolarForCausalLM"]},
    ),
    Family(
        "Rnj-1",
        "gemma3_text",
        "norms of queries and keys",
        {**_HEAD, **_TIED, "layer_types": ["full_attention"] * 3, "query_pre_attn_scalar": 24},
        overrides={"architectures": ["Rnj1ForCausalLM"]},
    ),
    Family(
        "openPangu",
        "llama",
        "biases",
        {**_HEAD, "attention_bias": True},
        overrides={"architectures": ["PanguEmbeddedForCausalLM"]},
    ),
]


def family_named(name: str) -> Family:
    """Return the family of that name. Raises KeyError if there is none."""
    return {family.name: family for family in FAMILIES}[name]
