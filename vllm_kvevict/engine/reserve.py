"""Memory that a server keeps ready for requests that are evicted again, or later than at the end of their prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.settings import eviction_config
from vllm_kvevict.eviction.building import policy_named
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.options.names import ALL, ALLOCATOR, DURING_DECODE, MAX_NUM_SEQS, POLICY
from vllm_kvevict.policies import Need

_USUAL_WINDOW = 32  # queries that policies look at unless their options say otherwise
_MOST_OF_CACHE = 0.01  # that the queries of answers take unless an operator says how many requests there may be


@dataclass(frozen=True)
class Reserve:
    """What is kept ready; every process of a server derives the same from its configuration.

    has_sums:     whether something may be summed up of every token, beside its position
    max_num_seqs: requests whose last queries can be remembered at once; 0: none looks at any
    is_default:   whether that number is vLLM's own, and holds as far as a hundredth of the KV cache takes it
    depth:        queries of each that are remembered
    num_heads:    query heads of one worker
    dtype:        of queries
    """

    has_sums: bool
    max_num_seqs: int
    is_default: bool
    depth: int
    num_heads: int
    dtype: torch.dtype

    def request_bytes(self, head_size: int) -> int:
        """Return the bytes of the queries of one request in one layer."""
        return self.depth * self.num_heads * head_size * self.dtype.itemsize

    def num_seqs(self, num_blocks: int, spec: AttentionSpec) -> int:
        """Return for how many requests there is room beside ``num_blocks`` blocks of layers that ``spec`` describes.

        Where layers share their keys and values, each that reads them adds its queries, which this does not count:
        every process knows as many requests without knowing the layers.
        """
        if not self.is_default:
            return self.max_num_seqs
        a_hundredth = int(num_blocks * spec.page_size_bytes * _MOST_OF_CACHE)
        return min(self.max_num_seqs, max(a_hundredth // self.request_bytes(spec.head_size), 1))

    def cache_bytes(
        self, available: int, spec: AttentionSpec, num_layers: int, per_byte: float, num_readers: int | None = None
    ) -> int:
        """Return how much of some bytes the KV cache can have, so that the queries and what grows with it fit as well.

        per_byte:    what is held beside each byte of the cache, the queries not among it
        num_readers: layers whose queries are remembered; None: those that have a cache
        """
        num_readers = num_readers or num_layers
        of_one = self.request_bytes(spec.head_size) * num_readers
        with_all = (available - self.max_num_seqs * of_one) / (1 + per_byte)
        if not self.is_default:
            return int(with_all)
        with_a_hundredth = available / (1 + per_byte + _MOST_OF_CACHE * num_readers / num_layers)
        with_one = (available - of_one) / (1 + per_byte)
        return int(min(max(with_all, with_a_hundredth), with_one))


def reserve_of(vllm_config: VllmConfig) -> Reserve | None:
    """Return what a server keeps ready; None if no request may be evicted so that it is needed.

    Raises ValueError if the operator has asked for what cannot be.
    """
    config = eviction_config(vllm_config)
    if config is None:
        return None
    method, given, most = config.method(), config.max_num_seqs, vllm_config.scheduler_config.max_num_seqs
    if given and vllm_config.speculative_config is not None:
        raise ValueError(
            f"{MAX_NUM_SEQS}: expected 0 with speculative decoding, which goes with no eviction during decode or "
            f"between chunks, got {given}; leave it out, or drop --speculative-config"
        )
    if given == 0 or (given is None and not method.needs_reserve):
        return None
    limits = config.limits
    # whatever a request may choose that makes the engine watch its answer
    is_free = any(map(limits.allows, (POLICY, ALLOCATOR)))
    remembers = method.watches_answer or is_free or limits.allows(DURING_DECODE)
    return Reserve(
        _may_sum_up(config),
        min(most if given is None else given, most) if remembers else 0,
        given is None,
        max(vllm_config.cache_config.block_size, method.query_window, _USUAL_WINDOW if is_free else 0),
        vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config),
        vllm_config.model_config.dtype,
    )


def _may_sum_up(config: EvictionConfig) -> bool:
    """Whether the server's own policy, or one that requests may choose, sums something up of every token."""
    policies, limits = [config.method().policy], config.limits
    if limits.allows(POLICY):
        if ALL in limits.allowed_policies:
            return True
        policies += [policy_named(name, {}) for name in limits.named_policies]
    return any(Need.ALL_QUERIES in traits_of(policy).needs for policy in policies)
