"""fp8 caches: numbers as vLLM's CPU kernel stores them, and a checkpoint that brings the scales of its cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
KEY_SCALES, VALUE_SCALES = (0.3, 0.07), (0.004, 0.05)


def stored(numbers: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Return ``numbers`` as a cache of ``dtype`` holds them: divided by the scale, cut off towards zero, saturated."""
    largest = torch.finfo(dtype).max
    divided = (numbers.float() * (1 / torch.tensor(scale))).clamp(-largest, largest)
    nearest = divided.to(dtype)
    # the next number towards zero has the next lower bits, whatever the sign
    away_from_zero = nearest.float().abs() > divided.abs()
    return (nearest.view(torch.uint8) - away_from_zero.to(torch.uint8)).view(dtype)


def checkpoint_with_scales(model: Path, folder: Path) -> Path:
    """Copy a model of two layers into ``folder`` as a checkpoint whose config asks for an fp8 cache with scales."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    weights = load_file(model / "model.safetensors")
    for layer, scales in enumerate(zip(KEY_SCALES, VALUE_SCALES, strict=True)):
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            weights[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([scale])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": scheme,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
