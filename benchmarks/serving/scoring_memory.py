"""What the eviction of one prompt holds in memory beside the KV cache, measured and computed.

python -m benchmarks.serving.scoring_memory [--tokens 65536 131072] [--policies snapkv h2o] [--scratch 64]

A made-up prompt is scored in all layers, allocated, selected, compacted and noted, by every policy with its own
allocator, and by SnapKV with every allocator; budgets are a quarter of the prompt. Policies that may go on while an
answer grows, or between chunks, then evict as many tokens again. The peak is that of what torch allocates, as on a GPU:
scores that wait on the host are none of it, nor is what kernels of the CPU hold. Heads are small and layers share their
pages: nothing that is measured depends on either. In MiB:

scoring:  peak while layers are scored
choosing: peak of allocating, selecting and planning the moves
moving:   peak of compacting
noting:   peak of noting positions, which prompts need that evict while they decode
again:    peak of evicting what they hold then, as much as the prompt was, with a chunk of new tokens
state:    computed, on top: what is summed up of the tokens while the prompt passes, of all layers
host:     computed: scores that wait on the host
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.held_bytes import held_bytes
from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.eviction.resident import ResidentEvictions
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies import POLICIES, EvictionPolicy, scratch
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.inputs import LayerWeights, ScoreInputs

BLOCK_SIZE, HEAD_SIZE, BUDGET = 16, 8, 0.25


@dataclass(frozen=True)
class Shape:
    """What a worker has of a model: layers, query heads, KV heads, head size."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int


SHAPES = {"8B": Shape(32, 32, 8, 128), "70B at TP 8": Shape(80, 8, 1, 128)}
TOKENS = (2**16, 2**17)
PHASES = ("scoring", "choosing", "moving", "noting", "again")
NUM_NEW = 256


def pairs() -> list[tuple[str, str]]:
    """Return every policy with its own allocator, and SnapKV with every allocator but "fixed", which needs a file."""
    own = [(name, POLICIES.get(name)().default_allocator) for name in POLICIES.names()]
    others = [("snapkv", name) for name in ALLOCATORS.names() if name != "fixed"]
    return [*own, *(pair for pair in others if pair not in own)]


def peaks(policy_name: str, allocator: str, shape: Shape, num_tokens: int, budget: float = BUDGET) -> dict[str, int]:
    """Return the most bytes that each phase holds, those included that the phases before have left."""
    policy = POLICIES.get(policy_name)()
    method = Method(policy, ALLOCATORS.get(allocator)(), policy.num_sink, policy.num_recent)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    plan = EvictionPlan(num_tokens, max(int(num_blocks * budget), -(-method.min_tokens // BLOCK_SIZE) + 1), BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    cache = draw(num_blocks + 1, shape.num_kv_heads, BLOCK_SIZE, 2 * HEAD_SIZE)
    pool = PagePool.from_layers([cache], "interleaved")
    pool = replace(pool, layer_offset=torch.zeros(shape.num_layers, dtype=torch.int64))
    block_ids = torch.randperm(num_blocks, generator=generator) + 1
    query = draw(max(method.query_window, 1), shape.num_heads, HEAD_SIZE)
    chunk = draw(NUM_NEW, shape.num_heads, HEAD_SIZE)
    inputs = ScoreInputs(query, *pool.readable(pool.layer_page_ids(0, block_ids)), num_tokens, 0.3)
    weights, state = _weights(shape, num_tokens), None
    if Need.ALL_QUERIES in policy.needs:
        num_queries = num_tokens if policy_name == "compactor" else 64  # of others the state has no other size
        queries = draw(num_queries, shape.num_heads, HEAD_SIZE)
        state = policy.observe(None, replace(inputs, query=queries, weights=weights))
    pseudo_query = draw(policy.num_pseudo_tokens, shape.num_heads, HEAD_SIZE) if policy.num_pseudo_tokens else None
    residents, found = Residents(pool), {}
    _ = residents.positions
    with held_bytes() as held:
        for phase in _phases(Eviction(method, plan, pool, block_ids), query, weights, state, pseudo_query, residents):
            found[phase] = held.most
            held.most = held.now
    found["again"] = 0
    if policy.supports_decode and num_blocks * BLOCK_SIZE == num_tokens:
        table = pool.page_ids(block_ids)
        num_pages = torch.full(table.shape[:2], num_blocks)
        num_full = num_pages - NUM_NEW // BLOCK_SIZE
        _ = residents.sums
        with held_bytes() as held:
            tables = table[None], num_pages[None], num_full[None]
            again = ResidentEvictions(method, [num_tokens], [NUM_NEW], pool, residents, *tables)
            for layer in range(shape.num_layers):
                again.score_layers(range(layer, layer + 1), query[None, None], chunk[None, None], [0.3], [weights])
            again.compact()
            found["again"] = held.most
    return found


def _phases(
    eviction: Eviction, query: torch.Tensor, weights: LayerWeights, state: Any, pseudo_query: Any, residents: Residents
) -> Iterator[str]:
    for layer in range(eviction.pool.num_layers):
        eviction.score_layer(layer, query, 0.3, query, weights, state, pseudo_query)
    eviction.score_waiting()
    yield "scoring"
    eviction.choose()
    yield "choosing"
    eviction.compact()
    yield "moving"
    eviction.alone.note(residents, [None])
    yield "noting"


def _weights(shape: Shape, num_tokens: int) -> LayerWeights:
    angles = torch.arange(num_tokens)[:, None] * torch.tensor([1.0, 0.1])
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=1), is_neox_style=True)
    return LayerWeights(rotary, torch.randn(16, shape.num_heads * HEAD_SIZE))


def computed(policy: EvictionPolicy, shape: Shape, num_tokens: int) -> dict[str, int]:
    """Return the bytes of what the policy has summed up, and of scores that wait on the host."""
    sizes = shape.num_heads, shape.num_kv_heads, shape.head_size
    scores = 4 * shape.num_layers * shape.num_kv_heads * num_tokens
    state = policy.state_bytes(*sizes) * shape.num_layers * num_tokens
    return {"state": state, "host": 0 if scratch.fits(scores) else scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--policies", nargs="+", choices=POLICIES.names(), default=POLICIES.names())
    parser.add_argument("--scratch", type=int, default=scratch.DEFAULT_MOST_BYTES >> 20, help="MiB")
    arguments = parser.parse_args()
    scratch.set_most_bytes(arguments.scratch << 20)
    columns = (*PHASES, "state", "host")
    print(f"| model | tokens | policy | allocator | {' | '.join(columns)} |\n|{' --- |' * (4 + len(columns))}")
    for model, shape in SHAPES.items():
        for num_tokens in arguments.tokens:
            for policy, allocator in pairs():
                if policy in arguments.policies:
                    found = peaks(policy, allocator, shape, num_tokens)
                    found |= computed(POLICIES.get(policy)(), shape, num_tokens)
                    row = " | ".join(f"{found[column] / 2**20:,.1f}" for column in columns)
                    print(f"| {model} | {num_tokens:,} | {policy} | {allocator} | {row} |", flush=True)


if __name__ == "__main__":
    main()
