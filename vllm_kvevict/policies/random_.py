"""Random: the baseline that any policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, ScoreInputs
from vllm_kvevict.policies.options import between

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

    seed: Annotated[int, between(0, 2**63 - 1)] = 0
    name: ClassVar[str] = "random"

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self.seed + inputs.layer * _LAYER_STRIDE) % 2**63)
        draws = torch.rand(inputs.num_kv_heads, inputs.kv_len, generator=generator, device="cpu")
        return draws.to(inputs.keys.device)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads
