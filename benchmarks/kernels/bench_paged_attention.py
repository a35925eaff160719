"""Time paged_attention on a GPU against its reference: python -m benchmarks.kernels.bench_paged_attention."""

import argparse

import torch

from benchmarks.timing import append_row, measure_in_turn
from vllm_kvevict.kernels.optional_xformers import HAS_XFORMERS
from vllm_kvevict.kernels.paged_attention import PagedRows, paged_attention, paged_attention_reference


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print and append a CSV row."""
    torch.manual_seed(0)
    sizes = arguments.rows, -(-2 * arguments.tokens // arguments.block_size)
    pages = torch.randn(sizes[0] * sizes[1], arguments.block_size, 2 * arguments.head_size, device="cuda").bfloat16()
    keys, values = pages.split(arguments.head_size, dim=2)
    table = torch.randperm(len(pages), device="cuda").view(sizes).int()
    lens = torch.randint(1, 2 * arguments.tokens, (arguments.rows,), device="cuda").int()
    query = torch.randn(arguments.rows, arguments.group, arguments.head_size, device="cuda").bfloat16()
    rows = PagedRows.of(*sizes, arguments.block_size, query.device)
    inputs = (query, keys, values, table, lens, arguments.head_size**-0.5, rows)
    # the tolerance and its reason are those of tests/kernels/test_paged_attention.py
    torch.testing.assert_close(paged_attention(*inputs), paged_attention_reference(*inputs), rtol=0, atol=2e-2)

    def finish(call: object) -> None:
        torch.cuda.synchronize()

    native, reference = measure_in_turn(
        lambda: finish(paged_attention(*inputs)), lambda: finish(paged_attention_reference(*inputs)), arguments.repeats
    )
    moved = 2 * int(lens.sum()) * arguments.head_size * 2
    print(f"{arguments.rows} rows of {arguments.tokens} tokens on average, {torch.cuda.get_device_name()}")
    print(f"bytes that must move: {moved / 1e6:.1f} MB, {moved / native.median / 1e9:.0f} GB/s, launch included")
    print(f"xformers  {native}")
    print(f"reference {reference}, {reference.median / native.median:.1f} times xformers' time")
    append_row("paged_attention", {**vars(arguments), "gpu": torch.cuda.get_device_name()}, native, reference)


def parse_arguments() -> argparse.Namespace:
    """The shape to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="KV heads of all requests")
    parser.add_argument("--tokens", type=int, default=1024, help="of a row, on average")
    parser.add_argument("--group", type=int, default=4, help="query heads of a KV head")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_arguments()
    if torch.cuda.is_available() and HAS_XFORMERS:
        run(options)
    else:
        print("nothing to time: no GPU, or no xformers")
