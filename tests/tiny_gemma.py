"""A tiny random Gemma-3: of six layers, two see everything and four a window of 48 tokens. float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.tiny_llama import VOCAB_SIZE


def tiny_gemma_config(layer_types: list[str], **fields: Any) -> Gemma3TextConfig:
    """Return the configuration of a tiny Gemma-3 with these layers."""
    return Gemma3TextConfig(
        hidden_size=128,
        head_dim=32,
        intermediate_size=256,
        num_hidden_layers=len(layer_types),
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=48,
        layer_types=layer_types,
        query_pre_attn_scalar=32,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **fields,
    )


def build_tiny_gemma(folder: Path) -> Path:
    """Save the model, its attention sharp enough for scores to differ, and return its folder."""
    torch.manual_seed(0)
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = tiny_gemma_config(layer_types, vocab_size=VOCAB_SIZE, dtype="float32")
    model = Gemma3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                weight.fill_(1.5)  # Gemma scales by 1 + weight
            elif "embed_tokens" in name:
                weight.mul_(4.0)
    model.save_pretrained(folder)
    return folder
