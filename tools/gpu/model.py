"""A random Llama that every machine builds alike: attention sharp enough for eviction to matter, nothing downloaded."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools.gpu.runs import Work

HEAD_SIZE = 64
SHARPER = {"q_proj": 6.0, "k_proj": 6.0, "lm_head": 4.0}  # times the usual spread of a fresh model, 0.02


def build_model(work: Work, folder: Path) -> str:
    """Save the model in ``folder``, unless it is there; return a checksum of its weights."""
    checksum = folder / "checksum.txt"
    if not checksum.exists():
        model = LlamaForCausalLM(model_config(work)).to(torch.bfloat16)
        sums = fill(model)
        model.save_pretrained(folder)
        checksum.write_text(sums)
    return checksum.read_text()


def model_config(work: Work) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        intermediate_size=11 * work.hidden_size // 4,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )


def fill(model: torch.nn.Module) -> str:
    """Set every weight from a seed of its name, whatever the version of transformers; return a checksum of them."""
    checksum = 0
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            spread = 0.02 * next((factor for part, factor in SHARPER.items() if part in name), 1.0)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
            checksum = zlib.crc32(weight.view(torch.int16).numpy().tobytes(), checksum)
    return f"{checksum:08x}"
