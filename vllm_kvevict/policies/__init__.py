"""How tokens rank: one policy or family per file. Importing this package registers them."""

from vllm_kvevict.policies import (  # noqa: F401  # they register themselves
    chunkkv,
    compactor,
    criticalkv,
    curdkv,
    expected_attention,
    h2o,
    keydiff,
    knorm,
    kvpress_adapter,
    laq,
    laq_deferred,
    lava,
    morphkv,
    obcache,
    random_,
    snapkv,
    streaming_llm,
    tova,
    vatp,
)
from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, Need
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.inputs import LayerWeights, ScoreInputs, StepInputs
from vllm_kvevict.policies.options import ODD, above, at_least, between
from vllm_kvevict.policies.prompt_chunks import PromptChunks

__all__ = [
    "ODD",
    "POLICIES",
    "EvictionPolicy",
    "LayerWeights",
    "Need",
    "PromptChunks",
    "ScoreBatch",
    "ScoreInputs",
    "StepInputs",
    "above",
    "at_least",
    "between",
]
