"""Counts what Triton would compile for a GPU that need not be there, while requests are evicted on a CPU.

python -m tests.compilations

Prints JSON: the kernels that rehearsals have compiled, and those that had to be compiled behind them for requests of
all lengths. Triton's own code decides: it takes the arguments that our launchers pass, finds what it has to compile for
them, and is stopped there. So it must not be in the interpreter, which is chosen for a whole process.
"""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch

import vllm_kvevict
from tests.paged import make_pool
from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan, min_kept_blocks
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.eviction.rehearsal import Rehearsal
from vllm_kvevict.eviction.resident import ResidentEvictions
from vllm_kvevict.kernels import (
    chunk_attention,
    expand_page_table,
    leverage,
    move_tokens,
    select,
    slot_scores,
    streaming_sums,
    window_scores,
)
from vllm_kvevict.kernels.chunk_batch import ChunkBatch
from vllm_kvevict.kernels.expand_page_table import BatchRows
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.kernels.window_batch import Reduction, WindowBatch
from vllm_kvevict.policies import POLICIES, Need, ScoreInputs
from vllm_kvevict.policies.compactor import gaussian_sketch
from vllm_kvevict.policies.inputs import LayerWeights, StepInputs

LAUNCHERS: dict[Callable[..., Any], Callable[..., Any]] = {
    window_scores.window_scores: window_scores.window_scores_triton,
    streaming_sums.streaming_sums: streaming_sums._launch,
    chunk_attention.chunk_attention: chunk_attention._launch,
    leverage.leverage: leverage._launch,
    select.select: select.select_triton,
    select.count_best: select.count_best_triton,
    move_tokens.move_tokens: move_tokens.move_tokens_triton,
    slot_scores.slot_scores: slot_scores.slot_scores_triton,
    expand_page_table.expand_page_table: expand_page_table.expand_page_table_triton,
}
MODELS = [(2, 8, 2, 64), (3, 5, 1, 128), (2, 3, 3, 96)]  # layers, query heads, KV heads, head size
BLOCK_SIZE, DTYPE, SCALE = 16, torch.bfloat16, 0.25
# beyond what stays: none of 16, some of an odd number of blocks
NUM_EVICTED = (17, 32, 47, 80, 259)


def count_compilations(capability: int = 90) -> list[str]:
    """Return a list that grows by the name of a kernel whenever one is compiled from now on.

    Every kernel above is launched wherever one of its operators is called, and does nothing.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    compiled: list[str] = []
    nothing = SimpleNamespace(function=None, packed_metadata=None, run=_ignore, launch_metadata=_ignore)

    def compile_nothing(self: JITFunction, key: str, signature: Any, device: int, *_: Any) -> Any:
        compiled.append(self.fn.__name__)
        self.device_caches[device][0][key] = nothing
        return nothing

    JITFunction._do_compile = compile_nothing
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )
    for info in pkgutil.walk_packages(vllm_kvevict.__path__, f"{vllm_kvevict.__name__}."):
        if info.name.split(".")[1] in ("cache", "eviction", "policies", "budgets"):
            _launch_too(importlib.import_module(info.name))
    return compiled


def _ignore(*_: Any) -> None:
    pass


def _launch_too(module: Any) -> None:
    for name, value in list(vars(module).items()):
        if callable(value) and value in LAUNCHERS:
            setattr(module, name, functools.partial(_both, LAUNCHERS[value], value))


def _both(launch: Callable[..., Any], operator: Callable[..., Any], *arguments: Any) -> Any:
    launch(*arguments)
    return operator(*arguments)


def methods() -> Iterator[Method]:
    """Every built-in policy, at the end of prompts and in answers; every allocator."""
    for name in POLICIES.names():
        for schedule in ({}, {"during_decode": True}, {"during_decode": True, "interval": 1}):
            yield from _method(policy=name, **schedule)
    for name in ALLOCATORS.names():
        yield from _method(policy="snapkv", allocator=name)


def _method(**fields: Any) -> Iterator[Method]:
    with suppress(ValueError):  # the policy does not evict so, or the allocator needs an option
        yield EvictionConfig.parse({"budget": 512, **fields}).method()


def weights_of(layer: int, needs: frozenset[Need]) -> LayerWeights:
    angles = torch.arange(1024)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    return LayerWeights(Rotary(torch.cat([angles.cos(), angles.sin()], dim=1).to(DTYPE), is_neox_style=True))


def serve(method: Method, pool: PagePool, num_heads: int, num_evicted: int, num_chunks: int) -> None:
    """Evict a prompt that arrives in chunks, and then, if the method does, what its answer has filled."""
    num_kept = min_kept_blocks(method.min_tokens, BLOCK_SIZE, method.schedule.is_bounded) * BLOCK_SIZE
    plan = method.schedule.first_eviction(num_kept + num_evicted, num_kept, BLOCK_SIZE, method.min_tokens)
    assert plan is not None
    # as a model has them: beside keys and values, in chunks that begin anywhere
    width = num_heads + 2 * pool.num_kv_heads
    query = torch.randn(plan.num_tokens + 3, width, pool.head_size).to(DTYPE)[3:, :num_heads]
    query = query[: plan.num_tokens]
    block_ids = torch.arange(1, plan.num_blocks + 1)
    projection = torch.ones(1, num_heads * pool.head_size, dtype=DTYPE)
    weights = LayerWeights(weights_of(0, frozenset()).rotary, projection)
    eviction = Eviction(method, plan, pool, block_ids)
    policy, needs = method.policy, method.policy.needs
    for layer in range(pool.num_layers):
        state, seen = None, 0
        for chunk in query.tensor_split(num_chunks) if Need.ALL_QUERIES in needs else ():
            seen += len(chunk)
            pages = pool.layer_page_ids(layer, block_ids[: -(-seen // BLOCK_SIZE)])
            inputs = ScoreInputs(chunk, pool.keys, pool.values, pages, seen, SCALE, weights=weights, layer=layer)
            state = policy.observe(state, inputs)
        last = query[len(query) - method.query_window :].clone()
        pseudo_query = query[: max(policy.num_pseudo_tokens - num_chunks, 1)] if policy.num_pseudo_tokens else None
        if pseudo_query is not None:
            eviction.preselect_layer(layer, last, SCALE, weights)
        eviction.score_layer(layer, last, SCALE, last, weights, state, pseudo_query)
    read(pool, plan, eviction, num_chunks)
    if method.schedule.is_bounded:
        serve_answer(method, pool, query, weights, num_chunks)
    if method.schedule.per_token:
        serve_step(method, pool, num_heads, num_chunks)


def read(pool: PagePool, plan: EvictionPlan, eviction: Eviction, num_rows: int) -> None:
    """Expand the page tables of a batch that has the request in each row, of all layers together and one by one."""
    compaction, block_ids = eviction.finish(), eviction.full_block_ids
    table = PageTable.of(pool, 2 * num_rows, plan.num_tokens)
    table.add([""], compaction.pages, [plan], [block_ids])
    rows = torch.arange(num_rows, dtype=torch.int32)
    block_table = eviction.block_ids.to(torch.int32).repeat(num_rows, 1)
    batch = BatchRows(rows, rows * 0, torch.full_like(rows, plan.num_tokens), block_table)
    table.expand([(batch, plan.num_tokens), (batch, plan.num_tokens)])
    table._pages = table._pages[: len(table._pages) // 256]
    for layer in range(pool.num_layers):
        for pages in table.expand([(batch, plan.num_tokens), (batch, plan.num_tokens)]):
            pages.of(layer)


def serve_answer(method: Method, pool: PagePool, query: torch.Tensor, weights: LayerWeights, num_pages: int) -> None:
    """Evict a block from heads of two lengths, which are scored apart."""
    most = min_kept_blocks(method.min_tokens, BLOCK_SIZE, True) + num_pages
    in_use = torch.full((pool.num_layers, pool.num_kv_heads), most)
    in_use[:, -1] -= 1
    pages = pool.page_ids(torch.arange(1, most + 1))
    tables = pages[None], in_use[None], in_use[None] - 1
    eviction = ResidentEvictions(method, [most * BLOCK_SIZE], [BLOCK_SIZE], pool, Residents(pool), *tables)
    for layer in range(pool.num_layers):
        last, chunk = query[len(query) - max(method.query_window, 1) :], query[:BLOCK_SIZE]
        eviction.score_layers(range(layer, layer + 1), last[None, None], chunk[None, None], [SCALE], [weights])
    eviction.compact()


def serve_step(method: Method, pool: PagePool, num_heads: int, num_reqs: int) -> None:
    """Score what some requests hold, whose heads have some pages in common tables, which are views of larger ones."""
    num_pages = 2 * num_reqs + 1
    shape = num_reqs, pool.num_kv_heads, num_pages
    table = torch.randint(len(pool.pages), (2, *shape[:2], num_pages + 1))[1, :, :, :num_pages]
    num_queries = max(method.policy.query_window, 1)
    query = torch.randn(num_reqs, num_queries, num_heads, pool.head_size).to(DTYPE)
    positions = torch.arange(num_pages * BLOCK_SIZE).repeat(*shape[:2], 1)
    lengths, state = torch.full(shape[:1], num_pages * BLOCK_SIZE), torch.zeros(positions.shape)
    steps = StepInputs(query, pool.keys, table, positions, lengths, num_pages * BLOCK_SIZE, SCALE, state=state)
    method.policy.score_step(steps)


def serve_batch(pool: PagePool, num_heads: int, window: int, num_reqs: int, num_pages: int) -> None:
    """Score, select and move for several requests at once, of tables that are views of those of all layers."""
    table = torch.randint(len(pool.pages), (2, num_reqs, pool.num_kv_heads, num_pages))[1]
    query = torch.randn(num_reqs, window, num_heads, pool.head_size).to(DTYPE)
    most = num_pages * BLOCK_SIZE
    kv_lens = torch.full((num_reqs + 1,), most - 1)[1:]
    batch = WindowBatch(query, pool.keys, pool.values, table, kv_lens, most, SCALE)
    window_scores.window_scores_triton(batch, Reduction("mean", "max", 7))
    starts, rows = torch.arange(-1, num_reqs + 1), query.flatten(0, 1)
    sums = torch.zeros(pool.num_kv_heads, num_reqs * (most - 1) + 1)[:, 1:]
    places = (starts * window)[1:], (starts * (most - 1))[1:]
    streaming_sums._launch(ChunkBatch(rows, pool.keys, table, *places, window, most, SCALE), sums)
    lengths = torch.full((num_reqs,), window)
    chunks = torch.stack([starts[1:-1], lengths, places[0][:-1], lengths], dim=1)
    chunk_attention._launch(rows, pool.keys, table, chunks, window, SCALE, "mean")
    scores = torch.randn(num_reqs + 1, pool.num_kv_heads, most - 1)[1:]
    select.select_triton(scores, torch.full(scores.shape[:2], 5), num_reqs, num_pages)
    select.count_best_triton(scores, torch.full((num_reqs + 1,), 5)[1:])
    slots = torch.arange(2 * num_reqs + 2)[1:].unfold(0, num_reqs, num_reqs)
    move_tokens.move_tokens_triton(pool.keys, pool.values, slots[0], slots[1])
    blocks = torch.tensor([0, most - 9, most]).repeat(num_reqs + 1, 1)[1:]
    sketch = gaussian_sketch(pool.head_size, 48, 0)
    leverage._launch(pool.keys, table, blocks, most, weights_of(0, frozenset()).rotary, sketch, 0.0)


def main() -> None:
    compiled = count_compilations()
    rehearsed, later = [], []
    for num_layers, num_heads, num_kv_heads, head_size in MODELS:
        pool = make_pool(num_layers, num_kv_heads, 64, BLOCK_SIZE, head_size, "interleaved", dtype=DTYPE).pool
        pool.pages[:] = torch.randn(pool.pages.shape)
        for method in methods():
            Rehearsal(method, pool, num_heads, DTYPE, SCALE, weights_of).run()
        rehearsed += compiled
        compiled.clear()
        for method in methods():
            for num_chunks, num_evicted in enumerate(NUM_EVICTED, 1):
                serve(method, pool, num_heads, num_evicted, num_chunks)
        for num_reqs, num_pages in ((1, 3), (2, 7), (16, 8), (17, 40)):
            serve_batch(pool, num_heads, 32, num_reqs, num_pages)
        later += compiled
        compiled.clear()
    modules = [importlib.import_module(operator.__module__) for operator in LAUNCHERS]
    signatures = [signature for module in modules for signature in module.triton_signatures()]
    kernels = {kernel.fn.__name__ for kernel, *_ in signatures}
    print(json.dumps({"kernels": sorted(kernels), "rehearsed": rehearsed, "later": later}))


if __name__ == "__main__":
    main()
