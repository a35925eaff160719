"""The tiny Llama of the package, and prompts for it."""

from __future__ import annotations

import torch

from vllm_kvevict.engine.offline.check.tiny_llama import VOCAB_SIZE, build_tiny_llama, tiny_llama_config

__all__ = ["VOCAB_SIZE", "build_tiny_llama", "random_prompt", "tiny_llama_config"]


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
