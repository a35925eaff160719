"""What policies share that score one request as a batch of one."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvevict.policies.base import EvictionPolicy
from vllm_kvevict.policies.inputs import ScoreInputs


class BatchPolicy(EvictionPolicy):
    """A policy that has ``score_batch``, and no other way to score; and ``observe_chunks``, if it observes."""

    def observe(self, state: Any, inputs: ScoreInputs) -> Any:
        return self.observe_chunks([state], inputs.chunk)[0]

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return self.score_batch(ScoreInputs.together([inputs]))[0, 0]

    @property
    def layers_at_once(self) -> int:
        return 16
