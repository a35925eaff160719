"""A tiny random Llama 4: of four layers, two see everything and rotate nothing, and two see their chunk of 64 tokens.
float32, no experts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from tests.tiny_llama import VOCAB_SIZE

# vLLM scales queries of layers that rotate nothing as transformers does only if it is told to, or for long contexts
SETTINGS = {"override_generation_config": {"attn_temperature_tuning": True}}


def build_tiny_llama4(folder: Path) -> Path:
    """Save the model, its attention sharp enough for scores to differ, and return its folder."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        head_dim=32,
        intermediate_size=128,
        intermediate_size_mlp=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        no_rope_layers=[1, 0, 1, 0],
        attention_chunk_size=64,
        floor_scale=128,  # queries of layers that rotate nothing grow from here on
        moe_layers=[],
        interleave_moe_layer_step=0,
        num_local_experts=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32",
    )
    model = Llama4ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "embed_tokens" in name:
                weight.mul_(6.0)
    model.save_pretrained(folder)
    return folder
