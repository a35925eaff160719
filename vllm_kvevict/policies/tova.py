"""TOVA: keep the tokens that the last query attends to, the same ones for all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvevict.kernels.window_batch import Reduction
from vllm_kvevict.policies.base import POLICIES
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy
from vllm_kvevict.policies.inputs import StepInputs


@POLICIES.register("tova")
@dataclass(frozen=True)
class Tova(BatchPolicy):
    """Score a token by the attention that the last token of the prompt pays to it, averaged over all query heads.

    Paper: Oren et al. 2024 (TOVA), arXiv:2401.06104. The heads of a layer share one ranking, and keep the same tokens
    with the allocator ``uniform``. Departs from the paper, as kvpress does: the last token always stays (there it
    competes with its own attention); and eviction goes on during decode only if it is asked to.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "TOVA, arXiv:2401.06104"

    @property
    def query_window(self) -> int:
        return 1

    @property
    def num_recent(self) -> int:
        return 1

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        scores = batch.mean_over_peers(batch.window_scores(Reduction("mean")))
        return batch.fill_last(scores).expand(batch.shape)

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        return inputs.sum_over_heads(inputs.newest_attention()[:, :, None])[:, :, 0]

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 8 * num_kv_heads + 4  # the attention before and after it is reduced, and its mean over the KV heads
