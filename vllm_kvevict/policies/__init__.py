"""How tokens rank: one file per published method. Importing this package registers them."""

from vllm_kvevict.policies import (
    chunkkv,
    compactor,
    criticalkv,
    curdkv,
    expected_attention,
    h2o,
    keydiff,
    knorm,
    kvpress_adapter,
    lava,
    obcache,
    random_,
    snapkv,
    streaming_llm,
    tova,
    vatp,
)
from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, Need, ScoreInputs

__all__ = [
    "POLICIES",
    "EvictionPolicy",
    "Need",
    "ScoreInputs",
    "chunkkv",
    "compactor",
    "criticalkv",
    "curdkv",
    "expected_attention",
    "h2o",
    "keydiff",
    "knorm",
    "kvpress_adapter",
    "lava",
    "obcache",
    "random_",
    "snapkv",
    "streaming_llm",
    "tova",
    "vatp",
]
