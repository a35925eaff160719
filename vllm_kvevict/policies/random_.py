"""Random: the baseline that any policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, ScoreInputs

_LAYER_STRIDE = 1_000_003  # so that neighbouring seeds do not share layers


@POLICIES.register("random")
@dataclass(frozen=True)
class Random(EvictionPolicy):
    """Score every token of every KV head by a draw from a uniform distribution.

    No paper: the usual baseline. Draws depend on the seed, the layer, the length of the prompt and the number of the
    KV head, and are made on the CPU, so that every machine makes the same. Under tensor parallelism all ranks make the
    same draws for their own heads.

    seed: of the generator, at least 0

    Raises ValueError for another value.
    """

    seed: int = 0
    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"random.seed: expected a whole number from 0 to 2**63 - 1, got {self.seed!r}")

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self.seed + inputs.layer * _LAYER_STRIDE) % 2**63)
        draws = torch.rand(inputs.num_kv_heads, inputs.kv_len, generator=generator, device="cpu")
        return draws.to(inputs.keys.device)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads
