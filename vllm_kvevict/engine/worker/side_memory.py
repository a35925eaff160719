"""What a worker holds beside the KV cache: taken before vLLM sizes the cache, or counted when it does."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, UniformTypeKVCacheSpecs

from vllm_kvevict.cache.page_table import PageTable, PageTableMemory
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.query_ring import QueryRing
from vllm_kvevict.cache.readers import Readers
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.reserve import Reserve, reserve_of
from vllm_kvevict.engine.scheduler.managers import EvictionSpec
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.policies import Need, scratch

# held at once, each as large as the bound of the scratch: scores that wait, a tile of them, and where its tokens move;
# a quarter is for what does not go in tiles, such as page lists (benchmarks/serving/scoring_memory.py measures it all)
_NUM_TILES = 4

logger = logging.getLogger("vllm.kvevict")


@dataclass(frozen=True)
class ModelMemory:
    """What is taken for the evicted layers of one model when it is loaded.

    spec:        of the cache of each of these layers
    num_layers:  how many there are on this worker
    page_table:  all of a page table that does not grow with the pool
    holes:       [max_num_reqs, num_layers, num_kv_heads] int64, as in ``TokenEvictor``; for no request if none may be
                 evicted token by token
    weights:     what policies may ask of the model
    readers:     which layers read the pages of each
    summed_bytes: of each token in each layer, what the server's own policy sums up of a prompt until it ends
    """

    spec: AttentionSpec
    num_layers: int
    summed_bytes: float
    page_table: PageTableMemory
    holes: torch.Tensor
    weights: ModelWeights
    readers: Readers

    @classmethod
    def take(
        cls,
        vllm_config: VllmConfig,
        config: EvictionConfig,
        specs: Mapping[str, AttentionSpec],
        model: nn.Module,
        device: torch.device,
        targets: Mapping[str, str] | None = None,
    ) -> ModelMemory:
        """specs: of the evicted layers of ``model``, by their names
        targets: of each layer that has no cache of its own, the one of these whose cache it reads; None: there is none

        Raises ValueError if the server's own policy asks for something that the model does not have.
        """
        spec, layers = next(iter(specs.values())), list(specs)
        sizes = len(layers), spec.num_kv_heads
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        max_tokens = vllm_config.model_config.max_model_len
        page_table = PageTableMemory.take(*sizes, spec.block_size, max_num_reqs, max_tokens, device)
        num_replacing = 0 if reserve_of(vllm_config) is None else max_num_reqs
        holes = torch.full((num_replacing, len(layers), spec.num_kv_heads), 0, dtype=torch.int64, device=device)
        policy = config.method().policy
        num_heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        readers = Readers(layers, targets or {}, spec.num_kv_heads)
        summed = [policy.state_bytes(num_heads * n, spec.num_kv_heads, spec.head_size) for n in readers.counts]
        summed_bytes = sum(summed) / len(layers)
        needs = traits_of(policy).needs
        projections: dict[str, torch.Tensor] | None = {} if Need.OUTPUT_PROJECTION in needs else None
        weights = ModelWeights(model, layers, max_tokens, projections, targets)
        weights.check(config.policy, needs)
        if Need.OUTPUT_PROJECTION in needs:
            for layer in range(len(layers)):  # which keeps the copies of W_O
                weights.of(layer, needs)
        return cls(spec, len(layers), summed_bytes, page_table, holes, weights, readers)

    def bytes_per_byte(self, reserve: Reserve | None) -> float:
        """Return what grows with the cache, for each byte of it."""
        page_bytes = self.spec.page_size_bytes / self.spec.num_kv_heads
        per_slot = Residents.bytes_per_slot(reserve is not None, reserve is not None and reserve.has_sums)
        return (PageTable.BYTES_PER_PAGE + self.spec.block_size * per_slot) / page_bytes + self.summed_per_byte

    @property
    def summed_per_byte(self) -> float:
        """What is summed up of prompts that fill the cache, for each byte of it: it is left free, and taken by them."""
        return self.summed_bytes * self.spec.block_size / self.spec.page_size_bytes


@dataclass(frozen=True)
class Held:
    """All that a worker holds for one model once there is a cache. The arguments of ``ModelMemory`` are as there."""

    pool: PagePool
    page_table: PageTable
    ring: QueryRing
    residents: Residents
    holes: torch.Tensor
    weights: ModelWeights
    readers: Readers

    @classmethod
    def beside(cls, pool: PagePool, memory: ModelMemory, reserve: Reserve | None, num_blocks: int) -> Held:
        num_seqs, depth, num_heads, dtype = 0, 0, 0, torch.float32
        if reserve is not None:
            num_seqs, depth = reserve.num_seqs(num_blocks, memory.spec), reserve.depth
            num_heads, dtype = reserve.num_heads, reserve.dtype
        shape = memory.readers.num, num_seqs, depth, num_heads, pool.head_size
        return cls(
            pool,
            PageTable(pool, memory.page_table),
            QueryRing(torch.zeros(shape, dtype=dtype, device=pool.pages.device), memory.readers),
            Residents(pool, reserve is not None, reserve is not None and reserve.has_sums),
            memory.holes,
            memory.weights,
            memory.readers,
        )

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each thing, by its name in the log."""
        return {
            "page tables": self.page_table.num_step_bytes,
            "page lists": self.page_table.num_list_bytes + self.pool.layer_offset.nbytes,
            "arena of pages": self.page_table.num_arena_bytes,
            f"last queries of {self.ring.slots.max_num_reqs} requests": self.ring.num_bytes,
            "tokens in the slots of the cache": self.residents.num_bytes + self.holes.nbytes,
            "output projections": sum(copy.nbytes for copy in (self.weights.projections or {}).values()),
        }


class SideMemory:
    """What one worker holds for all of its models, and what it leaves free: for scoring, and for what is summed up.

    reserve:       what is kept ready for requests that are evicted again
    scratch_bytes: what is left free
    """

    def __init__(self, vllm_config: VllmConfig, config: EvictionConfig, models: Sequence[ModelMemory]) -> None:
        """models: the one that answers, then the draft model if there is one"""
        self.models = models
        self.reserve = reserve_of(vllm_config)
        self.scratch_bytes = config.scoring_scratch_mib << 20
        scratch.set_most_bytes(self.scratch_bytes // _NUM_TILES)

    def held(self, pools: Sequence[PagePool], num_blocks: int) -> list[Held]:
        """Take the rest beside the pools of the models, in a cache of so many blocks, and log all of it.

        Raises ValueError if vLLM has given the layers other blocks than they asked for, and requests that are evicted
        again count their tokens by these.
        """
        asked, got = self.models[0].spec.block_size, pools[0].block_size
        if self.reserve is not None and asked != got:
            raise ValueError(
                f"--kv-eviction during decode and between chunks needs blocks of one size; the layers of this model "
                f"asked for {asked} tokens and got {got}, as large as those of its other layers. Leave "
                f"--kv-evict-during-decode, --kv-evict-during-prefill and --kv-evict-max-num-seqs out"
            )
        held = [
            Held.beside(pool, model, self.reserve, num_blocks) for pool, model in zip(pools, self.models, strict=True)
        ]
        summed = sum(model.summed_per_byte * model.spec.page_size_bytes * model.num_layers for model in self.models)
        log_sizes(held, self.scratch_bytes + num_blocks * summed)
        return held

    def cache_bytes(self, available: int) -> int:
        """Return how much of some bytes the KV cache can have, so that all else fits as well."""
        per_byte = sum(model.bytes_per_byte(self.reserve) for model in self.models)
        left, target = available - self.scratch_bytes, self.models[0]
        if self.reserve is None:
            return max(int(left / (1 + per_byte)), 0)
        sizes = target.num_layers, per_byte, target.readers.num
        return max(self.reserve.cache_bytes(left, target.spec, *sizes), 0)

    def beside(self, cache_bytes: int) -> int:
        """Return the bytes that are still to be taken, or left free, beside a KV cache of this size."""
        total = self.scratch_bytes + sum(cache_bytes * model.bytes_per_byte(self.reserve) for model in self.models)
        if self.reserve is not None:
            target = self.models[0]
            num_blocks = cache_bytes // (target.spec.page_size_bytes * target.num_layers)
            of_one = self.reserve.request_bytes(target.spec.head_size) * target.readers.num
            total += self.reserve.num_seqs(num_blocks, target.spec) * of_one
        return int(total)

    def check(self, cache_bytes: int, free: int, left: int) -> None:
        """Warn of a KV cache of the user's size, or refuse it.

        free: bytes free on the device
        left: of these, those within what vLLM was told to use

        Raises ValueError if the cache and what is beside it do not fit.
        """
        beside = self.beside(cache_bytes)
        mib = f"{cache_bytes / 2**20:,.0f} MiB, and what eviction holds beside it {beside / 2**20:,.0f} MiB"
        if cache_bytes + beside > free:
            most = self.cache_bytes(free)
            raise ValueError(
                f"--kv-cache-memory-bytes: the KV cache would take {mib}, and the device has {free / 2**20:,.0f} MiB "
                f"left; give less than {most}, for the forward pass needs memory, too, or leave it out"
            )
        if cache_bytes + beside > left:
            within = f"{max(left, 0) / 2**20:,.0f}"
            logger.warning("The KV cache takes %s: more than --gpu-memory-utilization leaves (%s MiB)", mib, within)


def log_sizes(models: Sequence[Held], free_bytes: float) -> None:
    """Say what is held for all models, and what was left free."""
    sizes: Counter[str] = Counter()
    for held in models:
        sizes.update(held.sizes())
    logger.info(
        "KV eviction holds %.1f MiB beside the KV cache: %s; %.1f MiB are left free for scoring",
        sum(sizes.values()) / 2**20,
        ", ".join(f"{name} {num_bytes / 2**20:.1f}" for name, num_bytes in sizes.items()),
        free_bytes / 2**20,
    )


def is_evicted(spec: KVCacheSpec) -> bool:
    """Whether layers are evicted whose cache a spec describes."""
    if isinstance(spec, UniformTypeKVCacheSpecs):  # a draft model's heads may differ from its target's
        return all(is_evicted(layer_spec) for layer_spec in spec.kv_cache_specs.values())
    # without the hybrid manager, vLLM puts layers with a window into the group of full attention
    return isinstance(spec, EvictionSpec) and spec.sliding_window is None and spec.attention_chunk_size is None
