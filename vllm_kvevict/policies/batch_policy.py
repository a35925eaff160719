"""What policies share that score one request as a batch of one."""

from __future__ import annotations

import torch

from vllm_kvevict.policies.base import EvictionPolicy, ScoreInputs


class BatchPolicy(EvictionPolicy):
    """A policy that has ``score_batch``, and no other way to score."""

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return self.score_batch(ScoreInputs.together([inputs]))[0, 0]

    @property
    def layers_at_once(self) -> int:
        return 16
