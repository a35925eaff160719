"""What our kernels reach on a GPU, what an eviction costs there, and how fast attention reads evicted rows.

python -m benchmarks.kernels.gpu_rates

The shapes are those of Llama-3-8B in bfloat16, scrambled pages of 32 tokens, K and V side by side as on GPUs. Every
result is checked against the reference first. "kernel" is the time on the GPU alone, by replaying a graph of the
launches; "call" includes Python and the launch, and waits for the result.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

from benchmarks.timing import measure, write_row
from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.cache.compaction import KeptPages
from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan, plan_eviction
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.kernels import move_tokens as moving
from vllm_kvevict.kernels import select as selecting
from vllm_kvevict.kernels.chunk_batch import ChunkBatch
from vllm_kvevict.kernels.expand_page_table import BatchRows
from vllm_kvevict.kernels.native import cuda_library
from vllm_kvevict.kernels.optional_xformers import HAS_XFORMERS
from vllm_kvevict.kernels.paged_attention import PagedRows, paged_attention
from vllm_kvevict.kernels.streaming_sums import streaming_sums, streaming_sums_reference
from vllm_kvevict.kernels.window_batch import Reduction, WindowBatch
from vllm_kvevict.kernels.window_scores import window_scores, window_scores_reference
from vllm_kvevict.policies import POLICIES

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, WINDOW = 32, 32, 8, 128, 32, 32
SCALE, DTYPE = HEAD_SIZE**-0.5, torch.bfloat16
REDUCTIONS = {"snapkv": Reduction("mean", "max", 7), "lava": Reduction("max", "max", 7, "largest_value_norm")}


@dataclass(frozen=True)
class Rate:
    """One row. Seconds; bytes and operations of a call."""

    what: str
    shape: str
    kernel: float | None
    call: float
    num_bytes: float = 0
    operations: float = 0


def kernel_seconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=50, return_mode="median") * 1e-3


def call_seconds(call: Callable[[], object], repeats: int = 30) -> float:
    def finish() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return measure(finish, repeats).median


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written counted both, of a copy that no cache holds."""
    source = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    return 2 * source.numel() / kernel_seconds(lambda: target.copy_(source))


@functools.cache
def matrix_rate() -> float:
    """Operations per second of a large product of bfloat16 matrices."""
    left, right = torch.randn(2, 8192, 8192, device="cuda").to(DTYPE)
    return 2 * 8192**3 / kernel_seconds(lambda: left @ right)


def random_pool(num_blocks: int, num_layers: int = LAYERS) -> PagePool:
    block = (num_blocks, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    layers = torch.empty(num_layers, *block, dtype=DTYPE, device="cuda")
    for layer in layers:
        layer.normal_()
    return PagePool.from_layers(list(layers.unbind(0)), "interleaved")


def scoring(num_reqs: int, kv_len: int) -> Iterator[Rate]:
    pages_per_head = -(-kv_len // BLOCK_SIZE)
    pool = random_pool(num_reqs * pages_per_head, 1)
    blocks = torch.randperm(num_reqs * pages_per_head, device="cuda").view(num_reqs, -1)
    table = torch.stack([pool.layer_page_ids(0, of_request) for of_request in blocks])
    query = torch.randn(num_reqs, WINDOW, HEADS, HEAD_SIZE, device="cuda").to(DTYPE)
    lens = torch.full((num_reqs,), kv_len, device="cuda")
    batch = WindowBatch(query, pool.keys, pool.values, table, lens, kv_len, SCALE)
    page_bytes = num_reqs * KV_HEADS * kv_len * HEAD_SIZE * DTYPE.itemsize
    operations = 4 * query.numel() * kv_len
    for name, reduction in REDUCTIONS.items():
        call = partial(window_scores, batch, reduction)
        torch.testing.assert_close(call(), window_scores_reference(batch, reduction), rtol=1e-4, atol=1e-8)
        moved = (2 + (reduction.weight != "none")) * page_bytes + 4 * num_reqs * KV_HEADS * kv_len
        shape = f"{num_reqs} x {kv_len} tokens"
        yield Rate(f"window_scores {name}", shape, kernel_seconds(call), call_seconds(call), moved, operations)


def sums(kv_len: int, num_queries: int) -> Iterator[Rate]:
    pool = random_pool(kv_len // BLOCK_SIZE, 1)
    table = pool.layer_page_ids(0, torch.randperm(kv_len // BLOCK_SIZE, device="cuda"))
    query = torch.randn(num_queries, HEADS, HEAD_SIZE, device="cuda").to(DTYPE)
    expected, actual = torch.zeros(2, KV_HEADS, kv_len, device="cuda")
    starts = torch.tensor([[0, num_queries], [0, kv_len]], device="cuda")
    batch = ChunkBatch(query, pool.keys, table[None], *starts.unbind(), num_queries, kv_len, SCALE)
    streaming_sums_reference(batch, expected)
    streaming_sums(batch, actual)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    call = partial(streaming_sums, batch, actual)
    pairs = num_queries * (kv_len - num_queries) + num_queries * (num_queries + 1) // 2
    shape = f"{num_queries} queries, {kv_len} tokens"
    yield Rate("streaming_sums", shape, None, call_seconds(call), 0, 4 * HEADS * HEAD_SIZE * pairs)


def selecting_tokens(kv_len: int, budget: int) -> Iterator[Rate]:
    scores = torch.rand(LAYERS, KV_HEADS, kv_len, device="cuda") ** 8
    spread = torch.rand(LAYERS, KV_HEADS, device="cuda") + 0.5
    num_kept = (budget * spread).long()
    moved, shape = scores.numel() * 5, f"{LAYERS * KV_HEADS} x {kv_len} scores"
    arguments = (scores, num_kept, 4, WINDOW)
    expected = selecting.select_reference(*arguments)
    launchers = {"Triton": selecting.select_triton, "CUDA": selecting.select_cuda}
    if cuda_library() is None:
        del launchers["CUDA"]
    for name, select in launchers.items():
        assert select(*arguments).equal(expected)
        call = partial(select, *arguments)
        yield Rate(f"select {name}", shape, kernel_seconds(call), call_seconds(call), moved)
    others = {"topk": lambda: scores.topk(int(budget * 1.5), dim=-1), "sort": lambda: scores.sort(dim=-1)}
    for name, other in others.items():
        yield Rate(f"torch.{name}", shape, None, call_seconds(other), moved)


def prompt(num_tokens: int, budget: int) -> tuple[PagePool, torch.Tensor, EvictionPlan]:
    plan = plan_eviction(num_tokens, budget, BLOCK_SIZE, WINDOW)
    assert plan is not None
    return random_pool(plan.num_blocks), torch.randperm(plan.num_blocks, device="cuda"), plan


def evict(method: Method, pool: PagePool, block_ids: torch.Tensor, plan: EvictionPlan, query: torch.Tensor) -> Any:
    eviction = Eviction(method, plan, pool, block_ids)
    for layer in range(LAYERS):
        eviction.score_layer(layer, query, SCALE)
    torch.cuda.synchronize()
    start = perf_counter()
    eviction.finish()
    torch.cuda.synchronize()
    return eviction, perf_counter() - start


def moves(num_tokens: int, budget: int) -> Iterator[Rate]:
    pool, block_ids, plan = prompt(num_tokens, budget)
    method = Method(POLICIES.get("snapkv")(), ALLOCATORS.get("uniform")(), 0, WINDOW)
    query = torch.randn(WINDOW, HEADS, HEAD_SIZE, device="cuda").to(DTYPE)
    phases = list(evict(method, pool, block_ids, plan, query)[0].alone._compactions.moves())
    launchers = {"Triton": moving.move_tokens_triton, "CUDA": moving.move_tokens_cuda}
    if cuda_library() is None:
        del launchers["CUDA"]
    num_moves = sum(len(source) for source, _ in phases)
    shape = f"{num_moves} tokens of {num_tokens} to {budget}"
    for name, move in launchers.items():
        before = pool.pages.clone()
        for phase in phases:
            moving.move_tokens_reference(pool.keys, pool.values, *phase)
        expected, _ = pool.pages.clone(), pool.pages.copy_(before)

        def call(move: Callable[..., None] = move) -> None:
            for phase in phases:
                move(pool.keys, pool.values, *phase)

        call()
        assert pool.pages.equal(expected)
        yield Rate(
            f"move_tokens {name}", shape, kernel_seconds(call), call_seconds(call), 4 * num_moves * 2 * HEAD_SIZE
        )


def evictions(num_tokens: int, budget: int, policy: str, allocator: str) -> Iterator[Rate]:
    """A whole eviction: scoring layer by layer, and what comes after the last layer."""
    pool, block_ids, plan = prompt(num_tokens, budget)
    method = Method(POLICIES.get(policy)(), ALLOCATORS.get(allocator)(), 0, WINDOW)
    query = torch.randn(WINDOW, HEADS, HEAD_SIZE, device="cuda").to(DTYPE)
    finishing = []

    def call() -> None:
        finishing.append(evict(method, pool, block_ids, plan, query)[1])

    seconds, shape = call_seconds(call, 10), f"{num_tokens} tokens to {budget}, {LAYERS} layers"
    yield Rate(f"eviction {policy} + {allocator}", shape, None, seconds)
    yield Rate(f"of it after the last layer, {policy}", shape, None, sorted(finishing)[len(finishing) // 2])


def expansions(batch: int, kept: int) -> Iterator[Rate]:
    """What the page tables of a decode step take in which every request is evicted, of all layers together."""
    pages = kept // BLOCK_SIZE
    # nobody reads the tokens
    numbers = torch.empty(batch * (pages + 2) * LAYERS * KV_HEADS, 1, device="cuda")
    tokens = numbers[:, :, None].expand(-1, BLOCK_SIZE, HEAD_SIZE)
    layers = torch.arange(LAYERS, device="cuda") * KV_HEADS
    plan = EvictionPlan(8 * kept + 5, pages + 1, BLOCK_SIZE)
    pool = PagePool(numbers, tokens, tokens, layers, LAYERS * KV_HEADS, KV_HEADS)
    table = PageTable.of(pool, batch, plan.num_tokens + BLOCK_SIZE)
    ids = torch.arange(batch * (pages + 2), device="cuda").view(batch, -1)
    lists = ids[:, None, None, : pages + 1].expand(-1, LAYERS, KV_HEADS, -1)
    counts = torch.full((batch, LAYERS, KV_HEADS), pages + 1, device="cuda")
    req_ids = [str(req) for req in range(batch)]
    table.add(req_ids, KeptPages(lists, counts, [pages + 1] * batch), [plan] * batch, [*ids[:, :pages]])
    rows = torch.arange(batch, dtype=torch.int32, device="cuda")
    block_table = torch.zeros(batch, plan.num_blocks + 1, dtype=torch.int32, device="cuda")
    slots = torch.from_numpy(table.slots.of(req_ids)).cuda()
    some = BatchRows(rows, slots, torch.full_like(rows, plan.num_tokens + 3), block_table)
    call = partial(table.expand, [(some, kept + BLOCK_SIZE)])
    yield Rate("expand_page_table", f"batch {batch}, {LAYERS} layers", None, call_seconds(call))


def decoding(batch: int, kept: int, num_tokens: int) -> Iterator[Rate]:
    """One layer's attention of a decode step: vLLM's Triton kernel over whole rows, and over folded ones."""
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except ImportError:
        print("vLLM is not installed: left out its attention")
        return
    group, segments = HEADS // KV_HEADS, 16
    sizes = (batch * KV_HEADS, group, segments)  # as vLLM's builder has for 128 / KV_HEADS requests
    scratch = (torch.empty(*sizes, HEAD_SIZE, device="cuda"), *torch.empty(2, *sizes, device="cuda"))
    scales = torch.ones(1, device="cuda")

    starts = torch.arange(batch * KV_HEADS + 1, dtype=torch.int32, device="cuda")

    def attend(
        query: torch.Tensor, kv: tuple[torch.Tensor, ...], table: torch.Tensor, lens: torch.Tensor, most: int
    ) -> torch.Tensor:
        (keys, values), output = kv, torch.empty_like(query)
        shapes = (len(query), query.shape[1], segments)
        parts = [scratch[0].view(*shapes, HEAD_SIZE), *(part.view(shapes) for part in scratch[1:])]
        unified_attention(
            q=query, k=keys, v=values, out=output, cu_seqlens_q=starts[: len(lens) + 1],
            max_seqlen_q=1, seqused_k=lens, max_seqlen_k=most, softmax_scale=SCALE, causal=True, window_size=(-1, -1),
            block_table=table, softcap=0, q_descale=None, k_descale=scales.expand(len(lens), keys.shape[2]),
            v_descale=scales.expand(len(lens), keys.shape[2]), seq_threshold_3D=128 // keys.shape[2],
            num_par_softmax_segments=segments, softmax_segm_output=parts[0], softmax_segm_max=parts[1],
            softmax_segm_expsum=parts[2],
        )  # fmt: skip
        return output

    query = torch.randn(batch, HEADS, HEAD_SIZE, device="cuda").to(DTYPE)
    blocks = -(-num_tokens // BLOCK_SIZE)
    pool = random_pool(batch * blocks, 1)
    ids = torch.randperm(batch * blocks, device="cuda").view(batch, -1)
    cache = pool.pages.view(-1, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    kv = cache.transpose(1, 2).split(HEAD_SIZE, dim=3)
    for length in (num_tokens, kept):
        lens = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        whole = partial(attend, query, kv, ids.int(), lens, length)
        moved, shape = 2 * batch * KV_HEADS * length * HEAD_SIZE * DTYPE.itemsize, f"batch {batch}, {length} tokens"
        yield Rate("attention, whole rows", shape, kernel_seconds(whole), call_seconds(whole), moved)
    folded_query = query.view(batch * KV_HEADS, group, HEAD_SIZE)
    folded_kv = pool.keys.unsqueeze(2), pool.values.unsqueeze(2)
    table = torch.cat([pool.layer_page_ids(0, of_request) for of_request in ids]).int()
    same = torch.full((batch * KV_HEADS,), kept, dtype=torch.int32, device="cuda")
    expected = whole()
    folded = attend(folded_query, folded_kv, table, same, kept).view_as(expected)
    torch.testing.assert_close(folded, expected, rtol=2e-2, atol=2e-3)  # bfloat16, tiles of other sizes
    ragged = (kept * torch.empty(batch * KV_HEADS, device="cuda").uniform_(0.2, 1.8)).int()
    ragged += ((batch * KV_HEADS * kept - ragged.sum()) // len(ragged)).int()
    for name, lens in (("uniform", same), ("ragged", ragged)):
        call = partial(attend, folded_query, folded_kv, table, lens, int(lens.max()))
        yield Rate(f"attention, folded, {name}", shape, kernel_seconds(call), call_seconds(call), moved)
    if HAS_XFORMERS:
        rows = PagedRows.of(*table.shape, BLOCK_SIZE, query.device)
        arguments = (folded_query, pool.keys, pool.values, table, ragged, SCALE, rows)
        expected = attend(folded_query, folded_kv, table, ragged, int(ragged.max()))
        torch.testing.assert_close(paged_attention(*arguments), expected, rtol=2e-2, atol=2e-3)
        call = partial(paged_attention, *arguments)
        yield Rate("attention, folded, xformers", shape, kernel_seconds(call), call_seconds(call), moved)


PARTS: dict[str, list[Callable[[], Iterator[Rate]]]] = {
    "window_scores": [partial(scoring, 1, 8000), partial(scoring, 1, 32000), partial(scoring, 8, 8000)],
    "streaming_sums": [partial(sums, 8192, 2048)],
    "select": [partial(selecting_tokens, 8000, 1024), partial(selecting_tokens, 32000, 2048)],
    "move_tokens": [partial(moves, 8000, 1024), partial(moves, 32000, 2048)],
    "eviction": [
        partial(evictions, 1000, 256, "snapkv", "uniform"),
        partial(evictions, 8000, 1024, "snapkv", "uniform"),
        partial(evictions, 8000, 1024, "lava", "lava"),
        partial(evictions, 32000, 2048, "lava", "lava"),
    ],
    "decode": [
        *(partial(expansions, batch, 1024) for batch in (1, 16, 64)),
        *(partial(decoding, batch, 1024, 7500) for batch in (1, 16, 64)),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--no-row", dest="write", action="store_false", help="do not write rows to the CSV")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing measured")
        return
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    print(f"{device}: copy {copy_bandwidth() / 1e12:.2f} TB/s, bfloat16 matrices {matrix_rate() / 1e12:.0f} TFLOP/s")
    for part in arguments.parts or PARTS:
        for measured in PARTS[part]:
            for rate in measured():
                report(rate, device, arguments.write)


def report(rate: Rate, device: str, write: bool) -> None:
    seconds = rate.kernel or rate.call
    by_bytes, by_operations = rate.num_bytes / copy_bandwidth() / seconds, rate.operations / matrix_rate() / seconds
    kernel = "" if rate.kernel is None else f"{rate.kernel * 1e6:9.1f}"
    print(f"{rate.what:32} {rate.shape:38} kernel {kernel:>9} us, call {rate.call * 1e6:9.1f} us", end="")
    print(f", {by_bytes:6.1%} of copying, {by_operations:6.1%} of matrices")
    if write:
        columns = {"kernel_us": kernel.strip(), "call_us": round(rate.call * 1e6, 1), "bytes": int(rate.num_bytes)}
        columns |= {"operations": int(rate.operations), "share_of_copy": round(by_bytes, 4)}
        columns |= {"share_of_matrices": round(by_operations, 4)}
        write_row("gpu_rates", {"gpu": device, "what": rate.what, "shape": rate.shape, **columns})


if __name__ == "__main__":
    main()
