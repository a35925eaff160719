"""StreamingLLM: keep the first tokens of the prompt and the most recent ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.policies.base import POLICIES, EvictionPolicy
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.inputs import ScoreInputs, StepInputs
from vllm_kvevict.policies.options import at_least


@POLICIES.register("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(EvictionPolicy):
    """Score a token by its position: the most recent stay, beside the attention sinks at the start.

    Paper: Xiao et al. 2023 (StreamingLLM), arXiv:2309.17453. The sinks stay because selection protects them: the
    server's own ``num_sink`` goes before this one. Departs from the paper: kept tokens keep their positions, where the
    paper counts positions inside the cache anew; and the window grows with the answer unless eviction is asked to go on
    during decode.

    num_sink: tokens at the start that always stay, >= 0

    Raises ValueError for another value.
    """

    num_sink: Annotated[int, at_least(0)] = 4
    name: ClassVar[str] = "streaming_llm"
    paper: ClassVar[str] = "StreamingLLM, arXiv:2309.17453"
    old_names: ClassVar[Mapping[str, str]] = {"n_sink": "num_sink"}

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        # exact in float32 up to 16,777,216 tokens
        positions = torch.arange(inputs.kv_len, dtype=torch.float32, device=inputs.keys.device)
        return positions.expand(inputs.num_kv_heads, -1)

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        return torch.arange(batch.max_kv_len, dtype=torch.float32, device=batch.keys.device).expand(batch.shape)

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        return inputs.positions.float()

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4  # one row, whatever the number of KV heads
