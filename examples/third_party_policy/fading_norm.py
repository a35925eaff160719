"""Fading norm: keep the tokens whose keys are short, the more so the nearer they are to the end of the prompt."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.policies import EvictionPolicy, ScoreInputs, above


@dataclass(frozen=True)
class FadingNorm(EvictionPolicy):
    """Score a token by minus the length of its key, times 2 for every ``half_life`` tokens between it and the end.

    half_life: tokens over which a key's length counts twice, > 0

    Raises ValueError for another value.
    """

    half_life: Annotated[float, above(0)] = 1024.0
    name: ClassVar[str] = "fading_norm"
    paper: ClassVar[str] = "an example"

    @property
    def num_sink(self) -> int:
        return 4

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        norms = torch.cat([inputs.gather_keys(*tile).norm(dim=-1) for tile in inputs.tiles()], dim=1)
        age = torch.arange(inputs.kv_len - 1, -1, -1, device=norms.device)
        return -norms * 2 ** (age / self.half_life)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 12 * num_kv_heads + 16  # the norms, their negative and the scores; ages and weights
