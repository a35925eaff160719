"""Policies that are asked request by request, as one of a third party may be."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import torch

from vllm_kvevict.policies import POLICIES
from vllm_kvevict.policies.base import EvictionPolicy
from vllm_kvevict.policies.chunkkv import ChunkKV
from vllm_kvevict.policies.inputs import ScoreInputs
from vllm_kvevict.policies.snapkv import SnapKV

THIRD_PARTY, WRAPPER = "a third party's", "a wrapper of a third party's"
ONE_BY_ONE = (THIRD_PARTY, WRAPPER)


@dataclass(frozen=True)
class OneByOne(SnapKV):
    """SnapKV, which changed ``score`` only."""

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return super().score(inputs)


def policy_of(name: str) -> EvictionPolicy:
    """Return the policy of this name, or one of the above."""
    if name == THIRD_PARTY:
        return OneByOne()
    with patch.dict(POLICIES._classes, {THIRD_PARTY: OneByOne}):
        return ChunkKV(THIRD_PARTY) if name == WRAPPER else POLICIES.get(name)()
