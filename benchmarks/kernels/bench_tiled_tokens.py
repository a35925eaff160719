"""Time gather_tiled_tokens and move_tiled_tokens: python -m benchmarks.kernels.bench_tiled_tokens."""

import argparse

import torch

from benchmarks.limits import shares
from benchmarks.timing import append_row, measure_in_turn
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.tiled_tokens import (
    gather_tiled_tokens,
    gather_tiled_tokens_reference,
    move_tiled_tokens,
    move_tiled_tokens_reference,
)


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print and append a CSV row for each of the two."""
    if library() is None:
        raise SystemExit("nothing to time: the CPU kernels are not built")
    torch.manual_seed(0)
    num_pages = 2 * arguments.tokens // arguments.block_size
    halves = torch.randn(num_pages, 2, arguments.block_size, arguments.head_size).bfloat16()
    pages = halves[:, 0], halves[:, 1]
    ids = torch.randperm(num_pages)[: num_pages // 2]
    slots = (ids[:, None] * arguments.block_size + torch.arange(arguments.block_size)).flatten()
    expected = gather_tiled_tokens_reference(*pages, slots)
    torch.testing.assert_close(gather_tiled_tokens(*pages, slots), expected, rtol=0, atol=0)
    moves = slots[: len(slots) // 2], slots[len(slots) // 2 :][: len(slots) // 2]
    calls = {
        "gather": (lambda: gather_tiled_tokens(*pages, slots), lambda: gather_tiled_tokens_reference(*pages, slots)),
        "move": (lambda: move_tiled_tokens(*pages, *moves), lambda: move_tiled_tokens_reference(*pages, *moves)),
    }
    for name, (native_call, reference_call) in calls.items():
        num_tokens = len(slots) if name == "gather" else len(moves[0])
        moved = 2 * 2 * num_tokens * arguments.head_size * 2  # K and V, read and written
        native, reference = measure_in_turn(native_call, reference_call, arguments.repeats)
        print(f"{name} of {num_tokens} tokens, head size {arguments.head_size}, block size {arguments.block_size}")
        print(f"bytes read and written: {moved / 1e6:.2f} MB, operations: none; {shares(native.median, moved)}")
        print(f"native    {native}")
        print(f"reference {reference}, {reference.median / native.median:.1f} times the native time")
        append_row("tiled_tokens", {"what": name, **vars(arguments)}, native, reference)


def parse_arguments() -> argparse.Namespace:
    """The shape to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", type=int, default=24_000, help="8,000 of each of three KV heads")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
