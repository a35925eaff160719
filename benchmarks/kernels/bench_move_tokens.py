"""Time move_tokens against its reference: python -m benchmarks.kernels.bench_move_tokens."""

import argparse

import torch

from benchmarks.timing import append_row, measure
from vllm_kvevict.kernels.move_tokens import move_tokens, move_tokens_reference
from vllm_kvevict.kernels.native import library


def setup(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pool and the moves of a compaction: survivors in ascending order fill the holes of the pages that stay."""
    torch.manual_seed(0)
    block_size, head_size, dtype = arguments.block_size, arguments.head_size, getattr(torch, arguments.dtype)
    storage = torch.randn(arguments.pages, 2 * block_size * head_size).to(dtype)
    keys, values = storage.view(arguments.pages, 2, -1).unbind(1)
    if arguments.packing == "transposed":
        keys = keys.view(-1, head_size, block_size).transpose(1, 2)
    else:
        keys = keys.view(-1, block_size, head_size)
    # the second half of the pool stays; a share of its slots are holes, filled from anywhere in the first half
    half = arguments.pages // 2 * block_size
    order = torch.randperm(half)[: int(half * arguments.fraction)]
    source = order.sort().values
    destination = half + torch.randperm(half)[: order.numel()].sort().values
    return keys, values.view(-1, block_size, head_size), source, destination


def check(inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Raise unless the compiled kernel is there and leaves the same bits as the reference."""
    if library() is None:
        raise SystemExit("nothing to time: the CPU kernels are not built")
    keys, values, source, destination = inputs
    expected = keys.clone(), values.clone()
    move_tokens_reference(*expected, source, destination)
    move_tokens(*inputs)
    torch.testing.assert_close((keys, values), expected, rtol=0, atol=0)


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print and append a CSV row. Moving the same tokens again changes nothing, so calls can repeat."""
    inputs = setup(arguments)
    check(inputs)
    num_tokens = inputs[2].numel()
    moved_bytes = num_tokens * 2 * arguments.head_size * inputs[0].element_size()
    native = measure(lambda: move_tokens(*inputs), arguments.repeats)
    reference = measure(lambda: move_tokens_reference(*inputs), max(5, arguments.repeats // 10))

    print(f"{num_tokens} tokens within {arguments.pages} pages of {arguments.block_size}, head size ", end="")
    print(f"{arguments.head_size}, {arguments.dtype}, {arguments.packing} keys, {torch.get_num_threads()} threads")
    print(f"read and written: 2 x {moved_bytes / 1e6:.2f} MB, {2 * moved_bytes / native.median / 1e9:.1f} GB/s")
    print("operations: none, bytes are copied")
    print(f"native    {native}, {native.median / num_tokens * 1e9:.0f} ns per token")
    print(f"reference {reference}, {reference.median / native.median:.1f} times the native time")
    append_row("move_tokens", {**vars(arguments)}, native, reference)


def parse_arguments() -> argparse.Namespace:
    """The shape to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pages", type=int, default=11520, help="4,096 tokens of SmolLM2-135M at block size 32")
    parser.add_argument("--fraction", type=float, default=0.1, help="moved tokens as a share of half the pool")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float8_e4m3fn"], default="bfloat16")
    parser.add_argument("--packing", choices=["transposed", "plain"], default="transposed", help="how a page stores K")
    parser.add_argument("--repeats", type=int, default=50)
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
