"""Time leverage against its reference: python -m benchmarks.kernels.bench_leverage."""

import argparse

import torch

from benchmarks.kernels.bench_streaming_sums import MODELS
from benchmarks.kernels.bench_streaming_sums import setup as setup_attention
from benchmarks.limits import copy_bandwidth, matrix_rate
from benchmarks.timing import append_row, measure
from vllm_kvevict.kernels.leverage import leverage, leverage_reference
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies.compactor import gaussian_sketch

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, Rotary, torch.Tensor, float]


def setup(arguments: argparse.Namespace) -> Inputs:
    """The keys that streaming_sums is timed with, a rotary table and a sketch."""
    batch = setup_attention(arguments)
    keys, kv_len, head_size = batch.keys, batch.max_kv_len, batch.keys.shape[2]
    angles = torch.arange(kv_len)[:, None] * torch.logspace(0, -4, head_size // 2)
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=1).to(keys.dtype), is_neox_style=True)
    return keys, batch.page_table[0], 0, kv_len, rotary, gaussian_sketch(head_size, arguments.rank, 0), 0.0


def check(inputs: Inputs) -> None:
    """Raise unless the compiled kernels are there and agree with the reference on these very inputs."""
    if library() is None:
        raise SystemExit("nothing to time: the CPU kernels are not built")
    actual, expected = leverage(*inputs), leverage_reference(*inputs)
    for index, (_, start, end) in enumerate(inputs[2].tolist()):
        block = (index, slice(None), slice(end - start))
        # the tolerance and its reason are those of tests/kernels/test_leverage.py
        torch.testing.assert_close(actual[block], expected[block], rtol=1e-5, atol=1e-6)


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print and append a CSV row."""
    inputs = setup(arguments)
    check(inputs)
    keys, page_table = inputs[:2]
    kv_len, num_kv_heads, head_size = arguments.kv_len, page_table.shape[1], keys.shape[2]
    # both passes multiply in float64; one triangle of the moments is enough
    operations = num_kv_heads * kv_len * (head_size**2 + 2 * head_size * arguments.rank)
    num_bytes = num_kv_heads * kv_len * (2 * head_size * keys.element_size() + 4)
    native = measure(lambda: leverage(*inputs), arguments.repeats)
    reference = measure(lambda: leverage_reference(*inputs), arguments.repeats)

    # a vector holds half as many numbers of 64 bits as of 32
    limits = num_bytes / copy_bandwidth(), operations / (matrix_rate() / 2)
    print(f"{arguments.model}, {kv_len} tokens in {len(inputs[2])} blocks, rank {arguments.rank}, ", end="")
    print(f"block size {arguments.block_size}, ", end="")
    print(f"{arguments.dtype}, {arguments.packing} keys, {torch.get_num_threads()} threads")
    print(f"to move: {num_bytes / 1e6:.2f} MB, {limits[0] * 1e3:.3f} ms at {copy_bandwidth() / 1e9:.1f} GB/s")
    print(f"to compute in float64: {operations / 1e9:.3f} GFLOP, {limits[1] * 1e3:.3f} ms at half of ", end="")
    print(f"{matrix_rate() / 1e9:.0f} GFLOP/s")
    share = max(limits) / native.median
    print(f"native    {native}, {share:.0%} of the limit")
    print(f"reference {reference}, {reference.median / native.median:.1f} times the native time")
    append_row("leverage", {**vars(arguments), "share_of_limit": round(share, 3)}, native, reference)


def parse_arguments() -> argparse.Namespace:
    """The shape to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--kv-len", type=int, default=4096, help="tokens in the cache")
    parser.add_argument("--block", type=int, help="tokens that are compared with each other; all if not given")
    parser.add_argument("--rank", type=int, default=48, help="columns of the sketch")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--packing", choices=["transposed", "plain"], default="transposed", help="how a page stores K")
    parser.add_argument("--repeats", type=int, default=50)
    parser.set_defaults(queries=1)  # which are not looked at
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
