"""A random Llama that every machine builds alike; nothing is downloaded.

Its weights are such that eviction matters and rounding does not: attention scores with a standard deviation of 3.3 put
about a tenth of the weight on the best of 1,500 keys. With much sharper scores, as the tests' tiny float32 models have
them, two bfloat16 kernels soon answer different texts.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools.gpu.runs import Work

HEAD_SIZE = 64
SPREAD = 0.64  # standard deviation of a projection's outputs, for inputs of 1
LOGITS = 2.56  # and of the logits


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
            spread = (LOGITS if "lm_head" in name else SPREAD) / weight.shape[1] ** 0.5
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
            checksum = zlib.crc32(weight.view(torch.int16).numpy().tobytes(), checksum)
    return f"{checksum:08x}"
