"""What policies share that work on the scores of another one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

import torch

from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, Need
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.inputs import ScoreInputs
from vllm_kvevict.policies.prompt_chunks import PromptChunks


@dataclass(frozen=True)
class WrapperPolicy(EvictionPolicy):
    """Needs, observes and protects what another policy does.

    policy:         name of the policy whose scores are used, not this one
    policy_options: its options

    Raises ValueError for an unknown policy, and for options that it does not take.
    """

    policy: str = "snapkv"
    policy_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str) or self.policy == self.name:
            raise ValueError(f"{self.name}.policy: expected the name of another policy, got {self.policy!r}")
        if not isinstance(self.policy_options, Mapping):
            raise ValueError(f"{self.name}.policy_options: expected options by name, got {self.policy_options!r}")
        super().__post_init__()
        _ = self.wrapped  # an unknown policy or option is refused now

    @cached_property
    def wrapped(self) -> EvictionPolicy:
        """The policy whose scores are used."""
        cls: Any = POLICIES.get(self.policy)
        allowed = [option.name for option in fields(cls)] if is_dataclass(cls) else []
        unknown = [option for option in self.policy_options if option not in allowed]
        if unknown:
            expected = ", ".join(allowed) or "no options"
            raise ValueError(f"{self.name}.policy_options: expected {expected} of {self.policy!r}, got {unknown[0]!r}")
        wrapped: EvictionPolicy = cls(**self.policy_options)
        return wrapped

    @property
    def query_window(self) -> int:
        return self.wrapped.query_window

    @property
    def needs(self) -> frozenset[Need]:
        return self.wrapped.needs

    @property
    def evicts_during_decode(self) -> bool:
        return self.wrapped.evicts_during_decode

    @property
    def num_deferred(self) -> int:
        return self.wrapped.num_deferred

    @property
    def num_pseudo_tokens(self) -> int:
        return self.wrapped.num_pseudo_tokens

    @property
    def supports_decode(self) -> bool:
        return self.wrapped.supports_decode

    @property
    def query_aware(self) -> bool:
        return self.wrapped.query_aware

    @property
    def num_sink(self) -> int:
        return self.wrapped.num_sink

    @property
    def num_recent(self) -> int:
        return self.wrapped.num_recent

    @property
    def layers_at_once(self) -> int:
        return self.wrapped.layers_at_once

    def observe(self, state: Any, inputs: ScoreInputs) -> Any:
        return self.wrapped.observe(state, inputs)

    def observe_chunks(self, states: Sequence[Any], chunks: PromptChunks) -> list[Any]:
        return self.wrapped.observe_chunks(states, chunks)

    def observe_batch(self, batch: ScoreBatch) -> torch.Tensor:
        return self.wrapped.observe_batch(batch)

    def state_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return self.wrapped.state_bytes(num_heads, num_kv_heads, head_size)

    def preselect(self, inputs: ScoreInputs) -> torch.Tensor:
        return self.wrapped.preselect(inputs)

    def preselect_batch(self, batch: ScoreBatch) -> torch.Tensor:
        return self.wrapped.preselect_batch(batch)

    def observed_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return self.wrapped.observed_bytes(num_heads, num_kv_heads, head_size)

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return self.rescore(ScoreInputs.together([inputs]), self.wrapped.score(inputs)[None, None])[0, 0]

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        return self.rescore(batch, self.wrapped.score_batch(batch))

    @abstractmethod
    def rescore(self, batch: ScoreBatch, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores [num_reqs, num_layers, num_kv_heads, max_kv_len] float32 of this policy.

        In a number of launches that does not depend on how many requests there are, and without waiting for the device.

        scores: likewise, those of the other policy: anything behind the tokens of a head. Read only
        """
