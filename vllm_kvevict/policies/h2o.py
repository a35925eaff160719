"""H2O: keep the heavy hitters, the tokens that all others attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, ClassVar

import torch

from vllm_kvevict.cache.ragged import padded, taken_apart
from vllm_kvevict.kernels.chunk_batch import ChunkBatch
from vllm_kvevict.kernels.streaming_sums import streaming_sums
from vllm_kvevict.kernels.window_batch import Reduction
from vllm_kvevict.policies.base import POLICIES, Need
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy
from vllm_kvevict.policies.inputs import StepInputs
from vllm_kvevict.policies.options import at_least
from vllm_kvevict.policies.prompt_chunks import PromptChunks


@POLICIES.register("h2o")
@dataclass(frozen=True)
class H2O(BatchPolicy):
    """Score a token by the attention it gets from all tokens of the prompt.

    Paper: Zhang et al. 2023 (H2O), arXiv:2306.14048. Departs from the paper: eviction begins when the prompt ends, so
    that no attention of it to evicted tokens is missing in the sums, and goes on during decode only if it is asked to;
    the recent tokens that always stay are a fixed number, not half of the budget; query heads that share a KV head are
    averaged. Every query of the prompt looks at every key again, which about doubles the cost of attention.
    ``H2O(normalize=True)`` is the score of kvpress's ``ObservedAttentionPress``, which protects nothing.

    normalize:  False: sum the attention, as the paper does, which favours tokens that more others can see; True: divide
                by the number of tokens that can see the key
    num_recent: tokens at the end of the prompt that always stay, >= 0; with half of the budget it is the paper's split

    Raises ValueError for another value.
    """

    normalize: bool = False
    num_recent: Annotated[int, at_least(0)] = 32
    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "H2O, arXiv:2306.14048"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.ALL_QUERIES})

    @property
    def supports_decode(self) -> bool:
        return not self.normalize  # which would have to know how many queries a token has seen

    def observe_chunks(self, states: Sequence[Any], chunks: PromptChunks) -> list[Any]:
        """Return of each prompt [num_kv_heads, kv_len] float32, the attention that each token got so far, mean over the
        group.
        """
        nothing = chunks.query.new_empty(chunks.num_kv_heads, 0, dtype=torch.float32)
        sums = padded([nothing if state is None else state for state in states], chunks.kv_lens, dim=1)
        batch = ChunkBatch(
            chunks.query,
            chunks.keys,
            chunks.page_table,
            chunks.on_device(chunks.first_queries),
            chunks.on_device([0, *accumulate(chunks.kv_lens)]),
            max(chunks.num_queries),
            max(chunks.kv_lens),
            chunks.scale * chunks.key_scale,
            chunks.softcap,
            chunks.sinks,
        )
        streaming_sums(batch, sums)
        return taken_apart(sums, chunks.kv_lens) if len(states) > 1 else [sums]

    def observe_batch(self, batch: ScoreBatch) -> torch.Tensor:
        # the mean over the queries, as the kernel has it, times their number
        received = batch.window_scores(Reduction("mean", own_columns=True)) * batch.query.shape[2]
        state: torch.Tensor = batch.state
        return state + received

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        sums: torch.Tensor = batch.of_tokens(batch.observed) if batch.state is None else batch.state
        if not self.normalize:
            return sums
        num_seen = batch.kv_lens[..., None] - torch.arange(batch.max_kv_len, device=sums.device)
        return sums / num_seen.clamp(min=1)

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        sums: torch.Tensor = inputs.state
        return sums + inputs.newest_attention()

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        # the sums of the parts that the CPU kernel adds up, and the new sums beside the old ones
        return 4 * (num_kv_heads + 15) + 8 * num_kv_heads

    def state_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads
