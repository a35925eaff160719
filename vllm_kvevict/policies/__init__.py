"""How tokens rank: one file per published method. Importing this package registers them."""

from vllm_kvevict.policies import lava, snapkv
from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, Need, ScoreInputs

__all__ = ["POLICIES", "EvictionPolicy", "Need", "ScoreInputs", "lava", "snapkv"]
