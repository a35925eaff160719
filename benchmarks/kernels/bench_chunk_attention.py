"""Time chunk_attention against its reference: python -m benchmarks.kernels.bench_chunk_attention."""

import argparse

import torch

from benchmarks.kernels.bench_streaming_sums import MODELS
from benchmarks.kernels.bench_streaming_sums import setup as setup_attention
from benchmarks.limits import copy_bandwidth, matrix_rate
from benchmarks.timing import append_row, measure
from vllm_kvevict.kernels.chunk_attention import chunk_attention, chunk_attention_reference
from vllm_kvevict.kernels.native import library

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float, str]


def setup(arguments: argparse.Namespace) -> Inputs:
    """A chunk at the end of what streaming_sums is timed with."""
    batch = setup_attention(arguments)
    length = len(batch.query)
    chunks = torch.tensor([[0, batch.max_kv_len - length, 0, length]])
    return batch.query, batch.keys, batch.page_table, chunks, length, batch.scale, arguments.reduction


def check(inputs: Inputs) -> None:
    """Raise unless the compiled kernel is there and agrees with the reference on these very inputs."""
    if library() is None:
        raise SystemExit("nothing to time: the CPU kernels are not built")
    # the tolerance and its reason are those of tests/kernels/test_chunk_attention.py
    torch.testing.assert_close(chunk_attention(*inputs), chunk_attention_reference(*inputs), rtol=1e-5, atol=1e-7)


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print and append a CSV row."""
    inputs = setup(arguments)
    check(inputs)
    query, keys, page_table = inputs[:3]
    chunk, num_heads, head_size = query.shape
    operations = 2 * num_heads * chunk**2 * head_size
    num_bytes = query.nbytes + page_table.shape[1] * chunk * (head_size * keys.element_size() + 4)
    native = measure(lambda: chunk_attention(*inputs), arguments.repeats)
    reference = measure(lambda: chunk_attention_reference(*inputs), arguments.repeats)

    limits = num_bytes / copy_bandwidth(), operations / matrix_rate()
    print(f"{arguments.model}, chunk of {chunk} tokens, block size {arguments.block_size}, {arguments.dtype}, ", end="")
    print(f"{arguments.packing} keys, {arguments.reduction}, {torch.get_num_threads()} threads")
    print(f"to move: {num_bytes / 1e6:.2f} MB, {limits[0] * 1e3:.3f} ms at {copy_bandwidth() / 1e9:.1f} GB/s")
    print(f"to compute: {operations / 1e9:.3f} GFLOP for logits, {limits[1] * 1e3:.3f} ms at ", end="")
    print(f"{matrix_rate() / 1e9:.0f} GFLOP/s")
    share = max(limits) / native.median
    print(f"native    {native}, {share:.0%} of the limit")
    print(f"reference {reference}, {reference.median / native.median:.1f} times the native time")
    append_row("chunk_attention", {**vars(arguments), "share_of_limit": round(share, 3)}, native, reference)


def parse_arguments() -> argparse.Namespace:
    """The shape to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--kv-len", type=int, default=4096, help="tokens in the cache, the chunk being the last")
    parser.add_argument("--queries", type=int, default=256, help="tokens of the chunk")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--packing", choices=["transposed", "plain"], default="transposed", help="how a page stores K")
    parser.add_argument("--reduction", choices=["mean", "max"], default="mean", help="over a group of query heads")
    parser.add_argument("--repeats", type=int, default=100)
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
