"""Time expand_page_table against its reference: python -m benchmarks.kernels.bench_expand_page_table."""

import argparse

import torch

from benchmarks.limits import shares
from benchmarks.timing import append_row, measure
from vllm_kvevict.kernels.expand_page_table import (
    BatchRows,
    LayerPages,
    PageLists,
    expand_page_table,
    expand_page_table_reference,
)
from vllm_kvevict.kernels.native import library

Inputs = tuple[PageLists, BatchRows, LayerPages, torch.Tensor, torch.Tensor]


def setup(arguments: argparse.Namespace) -> Inputs:
    """Lists of evicted requests, and a decode step of some of them, each some pages into its answer."""
    torch.manual_seed(0)
    layers, heads, batch = arguments.layers, arguments.kv_heads, arguments.batch
    shape = (arguments.max_num_reqs, layers, heads)
    counts = torch.randint(1, 2 * arguments.kept_pages, shape)
    starts = (counts.flatten(1).cumsum(1) - counts.flatten(1)).view(shape)
    list_blocks = 2 * arguments.kept_pages
    block_ids = torch.randperm(arguments.max_num_reqs * list_blocks).view(arguments.max_num_reqs, list_blocks)
    arena = torch.randint(1, 2**20, (block_ids.numel() * layers * heads,))
    own_from = torch.randint(1, arguments.max_pages // 2, shape[:1]) * arguments.block_size
    lists = PageLists(*(each.int() for each in (arena, block_ids, starts, counts, own_from)))
    slots = torch.randperm(arguments.max_num_reqs)[:batch]
    seq_lens = own_from[slots] + arguments.own_pages * arguments.block_size
    block_table = torch.randint(1, 2**12, (batch, arguments.max_pages))
    rows = BatchRows(*(each.int() for each in (torch.arange(batch), slots, seq_lens, block_table)))
    pages = torch.zeros(layers, batch * heads, arguments.columns, dtype=torch.int32)
    at = LayerPages(0, torch.arange(layers) * heads, layers * heads, arguments.block_size)
    return lists, rows, at, pages, torch.zeros(pages.shape[:2], dtype=torch.int32)


def check(inputs: Inputs) -> int:
    """Raise unless the compiled kernel is there and writes what the reference does; return the page ids it writes."""
    if library() is None:
        raise SystemExit("nothing to time: the CPU kernels are not built")
    *arguments, pages, kv_lens = inputs
    expected = pages.clone(), kv_lens.clone()
    expand_page_table_reference(*arguments, *expected)
    expand_page_table(*inputs)
    torch.testing.assert_close((pages, kv_lens), expected, rtol=0, atol=0)
    block_size = inputs[2].block_size
    return int(((kv_lens + block_size - 1) // block_size).sum())


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print and append a CSV row."""
    inputs = setup(arguments)
    num_pages = check(inputs)
    native = measure(lambda: expand_page_table(*inputs), arguments.repeats)
    reference = measure(lambda: expand_page_table_reference(*inputs), max(5, arguments.repeats // 10))

    print(f"{arguments.layers} layers of {arguments.batch} evicted requests, {arguments.kv_heads} KV heads, ", end="")
    print(f"{num_pages} pages, {torch.get_num_threads()} threads")
    num_bytes = 2 * num_pages * inputs[3].element_size()
    print(f"page ids read and written: {num_bytes / 1e3:.1f} kB; {shares(native.median, num_bytes)}")
    print("operations: none, page ids are copied; more than the copy bandwidth means that caches hold them")
    print(f"native    {native}")
    print(f"reference {reference}, {reference.median / native.median:.1f} times the native time")
    append_row("expand_page_table", {**vars(arguments)}, native, reference)


def parse_arguments() -> argparse.Namespace:
    """The shape to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="requests that decode")
    parser.add_argument("--layers", type=int, default=30, help="of SmolLM2-135M, as the KV heads")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--max-num-reqs", type=int, default=256, help="requests that there are lists for")
    parser.add_argument("--max-pages", type=int, default=256, help="pages of the longest request")
    parser.add_argument("--columns", type=int, default=48, help="of the page tables")
    parser.add_argument("--kept-pages", type=int, default=16, help="pages of a list on average: 512 tokens")
    parser.add_argument("--own-pages", type=int, default=8, help="pages of the answer")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    parser.add_argument("--repeats", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
