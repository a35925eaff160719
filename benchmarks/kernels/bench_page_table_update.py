"""Time page_table_update against its reference: python -m benchmarks.kernels.bench_page_table_update."""

import argparse

import torch

from benchmarks.limits import shares
from benchmarks.timing import append_row, measure
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.page_table_update import BatchBlocks, page_table_update, page_table_update_reference

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, BatchBlocks, int]


def setup(arguments: argparse.Namespace) -> Inputs:
    """A table of evicted requests, and a decode step in which some of them enter a block."""
    torch.manual_seed(0)
    batch, shape = arguments.batch, (arguments.layers, arguments.max_num_reqs, arguments.kv_heads)
    pages = torch.randint(1, 2**20, (*shape, arguments.max_pages), dtype=torch.int32)
    num_pages = torch.randint(1, arguments.max_pages // 2, shape)
    kv_lens = (num_pages * arguments.block_size).to(torch.int32)
    layer_offset = torch.arange(arguments.layers) * arguments.kv_heads
    slots = torch.randperm(arguments.max_num_reqs)[:batch]
    num_blocks = torch.randint(arguments.max_pages, 2 * arguments.max_pages, (batch,))
    first = num_blocks + torch.randint(1, arguments.max_pages // 2, (batch,))
    is_entering = torch.arange(batch) < arguments.entering
    block_table = torch.randint(1, 2**12, (batch, 4 * arguments.max_pages))
    new_tokens = torch.randint(1, 100, (batch,))
    stride = arguments.layers * arguments.kv_heads
    blocks = BatchBlocks(slots, num_blocks, first, first + is_entering, new_tokens, block_table)
    return pages, num_pages, kv_lens, layer_offset, stride, blocks, arguments.columns


def check(inputs: Inputs) -> None:
    """Raise unless the compiled kernel is there and leaves and returns the same page ids as the reference."""
    if library() is None:
        raise SystemExit("nothing to time: the CPU kernels are not built")
    copy = inputs[0].clone()
    expected = page_table_update_reference(copy, *inputs[1:])
    torch.testing.assert_close((*page_table_update(*inputs), inputs[0]), (*expected, copy), rtol=0, atol=0)


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print and append a CSV row. Entering the same blocks again changes nothing, so calls can repeat."""
    inputs = setup(arguments)
    check(inputs)
    row_bytes = arguments.layers * arguments.batch * arguments.kv_heads * arguments.columns * inputs[0].element_size()
    native = measure(lambda: page_table_update(*inputs), arguments.repeats)
    reference = measure(lambda: page_table_update_reference(*inputs), max(5, arguments.repeats // 10))

    print(f"{arguments.entering} of {arguments.batch} requests enter a block, {arguments.layers} layers, ", end="")
    print(f"{arguments.kv_heads} KV heads, {arguments.columns} columns, {torch.get_num_threads()} threads")
    print(f"rows read and written: 2 x {row_bytes / 1e6:.2f} MB; {shares(native.median, 2 * row_bytes)}")
    print("operations: none, page ids are copied; more than the copy bandwidth means that caches hold the rows")
    print(f"native    {native}")
    print(f"reference {reference}, {reference.median / native.median:.1f} times the native time")
    append_row("page_table_update", {**vars(arguments)}, native, reference)


def parse_arguments() -> argparse.Namespace:
    """The shape to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="requests that decode")
    parser.add_argument("--entering", type=int, default=2, help="those that enter a block: one of 32, as its tokens")
    parser.add_argument("--layers", type=int, default=30, help="of SmolLM2-135M, as the KV heads")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--max-num-reqs", type=int, default=256, help="requests that the table has room for")
    parser.add_argument("--max-pages", type=int, default=64, help="pages that a row has room for")
    parser.add_argument("--columns", type=int, default=32, help="those that are in use, for 512 tokens and an answer")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    parser.add_argument("--repeats", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
