"""Time move_tokens on the moves of a real compaction: python -m benchmarks.kernels.bench_move_tokens."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from benchmarks.timing import write_row
from vllm_kvevict.cache.compaction import Compactions
from vllm_kvevict.cache.marks import Marks
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import plan_eviction
from vllm_kvevict.kernels.move_tokens import move_tokens, move_tokens_reference
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.select import select

NUM_SINK, NUM_RECENT, POOL_KERNEL = 4, 32, 5  # kept tokens have neighbours that are kept, as with SnapKV
LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Compaction:
    """A cache and the moves of one request in it."""

    pool: PagePool
    phases: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def num_tokens(self) -> int:
        return sum(source.numel() for source, _ in self.phases)

    @property
    def bytes_asked(self) -> int:
        """Bytes read and written of the tokens themselves."""
        token = self.pool.keys.shape[2] + self.pool.values.shape[2]
        return 2 * self.num_tokens * token * self.pool.keys.element_size()

    def bytes_touched(self) -> int:
        """Bytes of the cache lines that hold these, each counted once in a phase as read and once as written.

        With transposed keys one element of a token is in each line of its page, so that a page's lines are touched by
        its first survivor. That is the least that memory has to move.
        """
        slots = [slots for phase in self.phases for slots in phase]
        return sum(self._lines(kv, part) for part in slots for kv in (self.pool.keys, self.pool.values)) * LINE

    def _lines(self, kv: torch.Tensor, slots: torch.Tensor) -> int:
        size, (page, token, dim) = kv.element_size(), kv.stride()
        first = slots // kv.shape[1] * page + slots % kv.shape[1] * token
        elements = kv.storage_offset() + first[:, None] + torch.arange(kv.shape[2]) * dim
        return (elements * size // LINE).unique().numel()  # the storage starts at a line


def setup(arguments: argparse.Namespace, num_tokens: int, budget: int) -> Compaction:
    """One request of a model in scrambled blocks, compacted to its budget by smooth random scores."""
    torch.manual_seed(0)
    layers, heads, block_size = arguments.layers, arguments.kv_heads, arguments.block_size
    plan = plan_eviction(num_tokens, budget, block_size, NUM_SINK + NUM_RECENT)
    if plan is None:
        raise SystemExit(f"nothing to move: {budget} tokens hold all of {num_tokens}")
    num_blocks = plan.num_blocks + plan.num_full_blocks
    content = torch.randn(num_blocks, heads, block_size, 2 * arguments.head_size).to(getattr(torch, arguments.dtype))
    caches = list(content.expand(layers, *content.shape).clone().unbind(0))
    pool = PagePool.from_layers(caches, arguments.packing)
    ids = torch.randperm(num_blocks)
    scores = torch.rand(layers, heads, num_tokens) ** 8
    scores = torch.nn.functional.avg_pool1d(scores, POOL_KERNEL, stride=1, padding=POOL_KERNEL // 2)
    pages = torch.full((layers, heads), plan.num_full_blocks)
    kept = select(scores, pages * block_size + plan.num_tail_tokens, NUM_SINK, NUM_RECENT)
    fresh = None if arguments.in_place else ids[plan.num_blocks :]
    own, fresh = pool.pages_of(ids[None, : plan.num_blocks]), None if fresh is None else pool.pages_of(fresh[None])
    compactions = Compactions(Marks(kept.flatten(0, 1)[None]), pages[None], own, [plan], fresh, [(0, layers * heads)])
    phases = [(source[source >= 0], destination[source >= 0]) for source, destination in compactions.moves()]
    return Compaction(pool, phases)


def check(compaction: Compaction) -> None:
    """Raise unless the compiled kernel is there and leaves the same bits as the reference."""
    if library() is None:
        raise SystemExit("nothing to time: the CPU kernels are not built")
    pool = compaction.pool
    before = pool.pages.clone()
    _move(compaction, move_tokens_reference)
    expected = pool.pages.clone()
    pool.pages.copy_(before)
    _move(compaction, move_tokens)
    torch.testing.assert_close(pool.pages, expected, rtol=0, atol=0)


def _move(compaction: Compaction, move: Callable[..., None]) -> None:
    for source, destination in compaction.phases:
        move(compaction.pool.keys, compaction.pool.values, source, destination)


def run(arguments: argparse.Namespace, num_tokens: int, budget: int) -> None:
    """Check, time, print and append a CSV row. Calls can repeat: the same tokens move from and to the same slots."""
    compaction = setup(arguments, num_tokens, budget)
    check(compaction)
    touched = compaction.bytes_touched()
    source = torch.ones(touched // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)
    calls = {
        "native": lambda: _move(compaction, move_tokens),
        "copy": lambda: target.copy_(source),
        "reference": lambda: _move(compaction, move_tokens_reference),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.repeats + 1):  # interleaved: the machine is noisy
        for name, call in calls.items():
            start = perf_counter()
            call()
            seconds[name].append(perf_counter() - start)
    native, copy, reference = (median(seconds[name][1:]) for name in calls)

    moved, asked = compaction.num_tokens, compaction.bytes_asked
    print(
        f"{num_tokens} tokens to {budget}, {arguments.layers} x {arguments.kv_heads} heads of {arguments.head_size}, ",
        end="",
    )
    print(f"block size {arguments.block_size}, {arguments.dtype}, {arguments.packing}, ", end="")
    print(f"{'in place' if arguments.in_place else 'fresh blocks'}, {torch.get_num_threads()} threads")
    print(f"moved:            {moved} tokens; operations: none, bytes are copied")
    print(f"bytes asked for:  {asked / 1e6:8.2f} MB read and written, {asked / native / 1e9:.1f} GB/s")
    print(f"of lines touched: {touched / 1e6:8.2f} MB read and written, {touched / native / 1e9:.1f} GB/s")
    print(f"native            {native * 1e3:8.3f} ms, {native / moved * 1e9:.0f} ns per token")
    print(
        f"limit             {copy * 1e3:8.3f} ms, a copy of the lines' bytes at {touched / copy / 1e9:.1f} GB/s; ",
        end="",
    )
    print(f"reached to {copy / native:.0%}")
    print(f"reference         {reference * 1e3:8.3f} ms, {reference / native:.1f} times the native time")
    figures = {"moved_tokens": moved, "bytes_asked": asked, "bytes_touched": touched}
    figures |= {"native_ms": round(native * 1e3, 4), "copy_ms": round(copy * 1e3, 4)}
    figures |= {"reference_ms": round(reference * 1e3, 4), "share_of_copy": round(copy / native, 3)}
    if arguments.write:
        options = {name: value for name, value in vars(arguments).items() if name not in ("tokens", "budgets", "write")}
        write_row("move_tokens", {"tokens": num_tokens, "budget": budget, **options, **figures})


def parse_arguments() -> argparse.Namespace:
    """The shapes to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8000], help="of the prompt")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 1024], help="tokens kept per head and layer")
    parser.add_argument("--layers", type=int, default=30, help="these are of SmolLM2-135M")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float8_e4m3fn"], default="bfloat16")
    parser.add_argument("--packing", choices=["transposed", "interleaved"], default="transposed")
    parser.add_argument("--in-place", action="store_true", help="compact into the last blocks instead of fresh ones")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-row", dest="write", action="store_false", help="do not append rows to the CSV")
    return parser.parse_args()


if __name__ == "__main__":
    parsed = parse_arguments()
    for length in parsed.tokens:
        for kept_tokens in parsed.budgets:
            run(parsed, length, kept_tokens)
