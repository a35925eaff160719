"""Time window_attention against its reference: python -m benchmarks.kernels.bench_window_attention."""

import argparse
from dataclasses import dataclass

import torch

from benchmarks.timing import append_row, measure
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.window_attention import window_attention, window_attention_reference


@dataclass(frozen=True)
class Model:
    """The attention shape of one layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int


MODELS = {
    "smollm2-135m": Model(9, 3, 64),
    "gemma3-270m": Model(4, 1, 256),
    "llama3-8b": Model(32, 8, 128),
}


def setup(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, float]:
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
    query = torch.randn(arguments.window, model.num_heads, model.head_size).to(dtype)
    return query, keys, page_table, arguments.kv_len, model.head_size**-0.5


def check(inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, float]) -> None:
    """Raise unless the compiled kernel is there and agrees with the reference on these very inputs."""
    if library() is None:
        raise SystemExit("nothing to time: the CPU kernels are not built")
    # the tolerance and its reason are those of tests/kernels/test_window_attention.py
    torch.testing.assert_close(window_attention(*inputs), window_attention_reference(*inputs), rtol=1e-5, atol=1e-7)


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print and append a CSV row."""
    inputs = setup(arguments)
    check(inputs)
    query, keys, page_table, kv_len, _ = inputs
    key_bytes = page_table.shape[0] * kv_len * query.shape[2] * keys.element_size()
    multiply_adds = query.numel() * kv_len
    native = measure(lambda: window_attention(*inputs), arguments.repeats)
    reference = measure(lambda: window_attention_reference(*inputs), max(5, arguments.repeats // 10))

    print(f"{arguments.model}, window {arguments.window}, {kv_len} tokens, block size {arguments.block_size}, ", end="")
    print(f"{arguments.dtype}, {arguments.packing} keys, {torch.get_num_threads()} threads")
    print(f"keys read twice: 2 x {key_bytes / 1e6:.2f} MB, {2 * key_bytes / native.median / 1e9:.1f} GB/s")
    print(f"logits computed twice: 2 x {multiply_adds / 1e6:.1f} M multiply-adds, ", end="")
    print(f"{4 * multiply_adds / native.median / 1e9:.0f} GFLOP/s")
    print(f"native    {native}")
    print(f"reference {reference}, {reference.median / native.median:.1f} times the native time")
    append_row("window_attention", {**vars(arguments)}, native, reference)


def parse_arguments() -> argparse.Namespace:
    """The shape to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--kv-len", type=int, default=4096, help="tokens in the cache")
    parser.add_argument("--window", type=int, default=32, help="queries")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--packing", choices=["transposed", "plain"], default="transposed", help="how a page stores K")
    parser.add_argument("--repeats", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
