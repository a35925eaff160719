"""A tiny random Llama: 2 layers, 8 query heads over 2 KV heads. Built where it is needed, never downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 512


def tiny_llama_config(num_attention_heads: int = 8, num_key_value_heads: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=num_attention_heads * 32,
        head_dim=32,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="float32",
    )


def build_tiny_llama(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny Llama whose attention is sharp enough for scores to differ, and return its folder."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config()).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(6.0)
            elif "lm_head" in name:
                weight.mul_(4.0)
    model.to(dtype).save_pretrained(folder)
    return folder
