"""Time streaming_sums against its reference: python -m benchmarks.kernels.bench_streaming_sums."""

import argparse

import torch

from benchmarks.kernels.bench_window_scores import MODELS
from benchmarks.limits import copy_bandwidth, matrix_rate
from benchmarks.timing import append_row, measure
from vllm_kvevict.kernels.chunk_batch import ChunkBatch
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.streaming_sums import streaming_sums, streaming_sums_reference


def setup(arguments: argparse.Namespace) -> ChunkBatch:
    """One layer's random inputs with scrambled pages, in the packing of the CPU engine unless told otherwise."""
    torch.manual_seed(0)
    model, dtype = MODELS[arguments.model], getattr(torch, arguments.dtype)
    pages_per_head = -(-arguments.kv_len // arguments.block_size)
    num_pages = pages_per_head * model.num_kv_heads * 2
    if arguments.packing == "transposed":
        keys = torch.randn(num_pages, model.head_size, arguments.block_size).to(dtype).transpose(1, 2)
    else:
        keys = torch.randn(num_pages, arguments.block_size, model.head_size).to(dtype)
    page_table = torch.randperm(num_pages)[: num_pages // 2].view(model.num_kv_heads, pages_per_head)
    query = torch.randn(arguments.queries, model.num_heads, model.head_size).to(dtype)
    starts = torch.tensor([[0, arguments.queries], [0, arguments.kv_len]])
    return ChunkBatch(
        query, keys, page_table[None], *starts.unbind(), arguments.queries, arguments.kv_len, model.head_size**-0.5
    )


def check(batch: ChunkBatch, sums: torch.Tensor) -> None:
    """Raise unless the compiled kernel is there and agrees with the reference on these very inputs."""
    if library() is None:
        raise SystemExit("nothing to time: the CPU kernels are not built")
    expected = sums.clone()
    streaming_sums_reference(batch, expected)
    streaming_sums(batch, sums)
    # the tolerance and its reason are those of tests/kernels/test_streaming_sums.py
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-7)


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print and append a CSV row."""
    batch = setup(arguments)
    query, kv_len, num_kv_heads = batch.query, batch.max_kv_len, batch.page_table.shape[1]
    sums = torch.zeros(num_kv_heads, kv_len)
    check(batch, sums)
    num_queries, num_heads, head_size = query.shape
    num_pairs = num_queries * (kv_len - num_queries) + num_queries * (num_queries + 1) // 2
    operations = 2 * num_heads * num_pairs * head_size
    num_bytes = query.nbytes + num_kv_heads * kv_len * (head_size * batch.keys.element_size() + 8)
    native = measure(lambda: streaming_sums(batch, sums), arguments.repeats)
    reference = measure(lambda: streaming_sums_reference(batch, sums), max(5, arguments.repeats // 10))

    limits = num_bytes / copy_bandwidth(), operations / matrix_rate()
    print(f"{arguments.model}, {num_queries} queries, {kv_len} tokens, block size {arguments.block_size}, ", end="")
    print(f"{arguments.dtype}, {arguments.packing} keys, {torch.get_num_threads()} threads")
    print(f"to move: {num_bytes / 1e6:.2f} MB, {limits[0] * 1e3:.3f} ms at {copy_bandwidth() / 1e9:.1f} GB/s")
    print(f"to compute: {operations / 1e9:.2f} GFLOP for logits, {limits[1] * 1e3:.3f} ms at ", end="")
    print(f"{matrix_rate() / 1e9:.0f} GFLOP/s")
    share = max(limits) / native.median
    print(f"native    {native}, {share:.0%} of the limit")
    print(f"reference {reference}, {reference.median / native.median:.1f} times the native time")
    append_row("streaming_sums", {**vars(arguments), "share_of_limit": round(share, 3)}, native, reference)


def parse_arguments() -> argparse.Namespace:
    """The shape to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--kv-len", type=int, default=4096, help="tokens in the cache")
    parser.add_argument("--queries", type=int, default=2048, help="tokens of the chunk")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--packing", choices=["transposed", "plain"], default="transposed", help="how a page stores K")
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
