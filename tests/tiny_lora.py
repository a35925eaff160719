"""Random LoRA adapters of a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def make_adapter(model: Path, folder: Path, seed: int) -> Path:
    """Save a random LoRA adapter of the queries and values of every layer, strong enough to change the answer."""
    config = json.loads((model / "config.json").read_text())
    size, rank = config["hidden_size"], 8
    value_size = size * config["num_key_value_heads"] // config["num_attention_heads"]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, out in (("q_proj", size), ("v_proj", value_size)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, size, generator=generator) / size**0.5
            weights[f"{prefix}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.6
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
