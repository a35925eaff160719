"""Time select against a sort, topk and its reference: python -m benchmarks.kernels.bench_select."""

import argparse
from statistics import median
from time import perf_counter

import torch

from benchmarks.timing import write_row
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.select import count_best, count_best_reference, select, select_reference

NUM_SINK, NUM_RECENT = 4, 32


def setup(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of many magnitudes, as attention has, and ragged numbers to keep."""
    torch.manual_seed(0)
    scores = torch.rand(arguments.layers, arguments.kv_heads, arguments.tokens) ** 8
    if arguments.tied:
        scores = (scores * 1000).round()
    spread = torch.rand(arguments.layers, arguments.kv_heads) + 0.5
    num_kept = (arguments.budget * spread).long().clamp(NUM_SINK + NUM_RECENT, arguments.tokens)
    return scores, num_kept


def check(scores: torch.Tensor, num_kept: torch.Tensor) -> None:
    """Raise unless the compiled kernel is there and gives the same bits as the reference."""
    if library() is None:
        raise SystemExit("nothing to time: the CPU kernels are not built")
    expected = select_reference(scores, num_kept, NUM_SINK, NUM_RECENT)
    torch.testing.assert_close(select(scores, num_kept, NUM_SINK, NUM_RECENT), expected, rtol=0, atol=0)
    totals = num_kept.sum(dim=1)
    torch.testing.assert_close(count_best(scores, totals), count_best_reference(scores, totals), rtol=0, atol=0)


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print and append a CSV row."""
    scores, num_kept = setup(arguments)
    check(scores, num_kept)
    most, totals = int(num_kept.max()), num_kept.sum(dim=1)
    moved = scores.numel() * (scores.element_size() + 1)  # every score is read, every mark written
    source = torch.ones(moved // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)
    calls = {
        "native": lambda: select(scores, num_kept, NUM_SINK, NUM_RECENT),
        "copy": lambda: target.copy_(source),
        "sort": lambda: scores.sort(dim=-1),
        "topk": lambda: scores.topk(most, dim=-1),
        "reference": lambda: select_reference(scores, num_kept, NUM_SINK, NUM_RECENT),
        "count_best": lambda: count_best(scores, totals),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.repeats + 1):  # interleaved: the machine is noisy
        for name, call in calls.items():
            start = perf_counter()
            call()
            seconds[name].append(perf_counter() - start)
    medians = {name: median(taken[1:]) for name, taken in seconds.items()}
    native = medians["native"]

    print(f"[{arguments.layers}, {arguments.kv_heads}, {arguments.tokens}] float32, ", end="")
    print(f"{int(num_kept.min())} to {most} kept, {torch.get_num_threads()} threads")
    print(f"bytes that must move: {moved / 1e6:.2f} MB, {moved / native / 1e9:.1f} GB/s; ", end="")
    print(f"a copy of them {medians['copy'] * 1e3:.3f} ms, {moved / medians['copy'] / 1e9:.1f} GB/s; ", end="")
    print(f"reached to {medians['copy'] / native:.0%}")
    compares = 32 * scores.numel()
    print(f"operations: at most {compares / 1e6:.0f} M compares (32 passes), {compares / native / 1e9:.1f} G/s if all")
    for name, taken in medians.items():
        print(f"{name:>10} {taken * 1e3:8.3f} ms, {taken / native:6.1f} times native")
    if arguments.write:
        options = {name: value for name, value in vars(arguments).items() if name != "write"}
        timings = {f"{name}_ms": round(taken * 1e3, 4) for name, taken in medians.items()}
        write_row("select", {**options, "bytes": moved, **timings})


def parse_arguments() -> argparse.Namespace:
    """The shape to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, help="these are of SmolLM2-135M")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--budget", type=int, default=1024, help="tokens kept per head and layer, on average")
    parser.add_argument("--tied", action="store_true", help="round the scores, so that many are equal")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-row", dest="write", action="store_false", help="do not append a row to the CSV")
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
