"""VATP: attention of the last queries, weighted by the value norm of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from vllm_kvevict.kernels.window_batch import Reduction
from vllm_kvevict.policies.base import POLICIES
from vllm_kvevict.policies.options import at_least
from vllm_kvevict.policies.window import WindowPolicy


@POLICIES.register("vatp")
@dataclass(frozen=True)
class Vatp(WindowPolicy):
    """Score a token by its attention from the last ``window`` queries, times the l1 norm of its value.

    Paper: Guo et al. 2024 (VATP), arXiv:2406.12335. The paper weights the attention of H2O or of Scissorhands, query
    head by query head; departing from it, the attention is that of SnapKV, pooled before it is weighted and averaged
    over the query heads of one KV head. ``Vatp(window=400, pool_kernel=1)`` is nearest to the paper's Scissorhands.
    The first tokens always stay, as in the paper: they get much attention, but have small values.

    window, pool_kernel: see ``ObservationWindow``; the paper has no pool, which is ``pool_kernel=1``
    pool:                how neighbours share their attention: "max" or "avg" (zero padding counts at the edges)
    num_sink:            tokens at the start of the prompt that always stay, >= 0; the authors' code has no default

    Raises ValueError for another value.
    """

    pool: Literal["max", "avg"] = "max"
    num_sink: Annotated[int, at_least(0)] = 20
    name: ClassVar[str] = "vatp"
    paper: ClassVar[str] = "VATP, arXiv:2406.12335"

    @property
    def reduction(self) -> Reduction:
        return Reduction("mean", self.pool, self.pool_kernel, weight="value_norm")
