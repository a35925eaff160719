"""Random: the baseline that any policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch

from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.policies.base import POLICIES
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy
from vllm_kvevict.policies.options import between

_LAYER_STRIDE = 1_000_003  # so that neighbouring seeds do not share layers


@POLICIES.register("random")
@dataclass(frozen=True)
class Random(BatchPolicy):
    """Score every token of every KV head by a draw from a uniform distribution.

    No paper: the usual baseline. Draws depend on the seed, the layer, the length of the prompt and the number of the
    KV head, and are made on the CPU, so that every machine makes the same. Under tensor parallelism all ranks make the
    same draws for their own heads.

    seed: of the generator, at least 0

    Raises ValueError for another value.
    """

    seed: Annotated[int, between(0, 2**63 - 1)] = 0
    name: ClassVar[str] = "random"

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        scores, (num_kv_heads, max_kv_len) = batch.new_scores().view(batch.shape), batch.shape[2:]
        draws = np.stack([self._draws(layer, num_kv_heads * max_kv_len) for layer in batch.layers])
        drawn = to_device(draws, batch.keys.device).expand(batch.shape[0], -1, -1)
        # head by head as many draws as it holds tokens
        first = torch.arange(num_kv_heads, device=drawn.device) * batch.kv_lens
        for start, end in batch.token_tiles():
            place = first[..., None] + torch.arange(start, end, device=drawn.device)
            place = place.clamp_(max=drawn.shape[2] - 1).flatten(2)  # behind a head's tokens: any draw
            scores[..., start:end] = drawn.gather(2, place).view(*batch.shape[:3], end - start)
        return scores

    def _draws(self, layer: int, count: int) -> np.ndarray:
        generator = torch.Generator().manual_seed((self.seed + layer * _LAYER_STRIDE) % 2**63)
        return torch.rand(count, generator=generator, device="cpu").numpy()

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 8 * num_kv_heads  # the draws and the scores; all else is a tile
