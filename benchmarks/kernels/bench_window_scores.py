"""Time window_scores against its reference: python -m benchmarks.kernels.bench_window_scores."""

import argparse
from dataclasses import asdict, dataclass

import torch

from benchmarks.limits import matrix_rate, shares
from benchmarks.timing import append_row, measure_in_turn
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.window_batch import Reduction, WindowBatch
from vllm_kvevict.kernels.window_scores import window_scores, window_scores_reference


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
REDUCTIONS = {
    "snapkv": Reduction("mean", "max", 7),
    "lava": Reduction("max", "max", 7, "largest_value_norm"),
    "vatp": Reduction("mean", "max", 7, "value_norm"),
}


def setup(arguments: argparse.Namespace) -> WindowBatch:
    """One layer's random inputs with scrambled pages, in the packing of the CPU engine unless told otherwise."""
    torch.manual_seed(0)
    model, dtype, block_size = MODELS[arguments.model], getattr(torch, arguments.dtype), arguments.block_size
    pages_per_head = -(-arguments.kv_len // block_size)
    shape = (arguments.requests, model.num_kv_heads, pages_per_head)
    num_owned = arguments.requests * model.num_kv_heads * pages_per_head
    keys, values = torch.randn(2, 2 * num_owned, model.head_size, block_size).to(dtype)
    keys, values = keys.transpose(1, 2), values.view(-1, block_size, model.head_size)
    if arguments.packing == "plain":
        keys = keys.contiguous()
    page_table = torch.randperm(2 * num_owned)[:num_owned].view(shape)
    query = torch.randn(arguments.requests, arguments.window, model.num_heads, model.head_size).to(dtype)
    kv_lens = torch.full((arguments.requests,), arguments.kv_len)
    return WindowBatch(query, keys, values, page_table, kv_lens, arguments.kv_len, model.head_size**-0.5)


def check(batch: WindowBatch, reduction: Reduction) -> None:
    """Raise unless the compiled kernel is there and agrees with the reference on these very inputs."""
    if library() is None:
        raise SystemExit("nothing to time: the CPU kernels are not built")
    # the tolerance and its reason are those of tests/kernels/test_window_scores.py
    expected = window_scores_reference(batch, reduction)
    torch.testing.assert_close(window_scores(batch, reduction), expected, rtol=1e-5, atol=1e-9)


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print and append a CSV row."""
    batch, reduction = setup(arguments), REDUCTIONS[arguments.reduction]
    check(batch, reduction)
    tokens = batch.page_table.shape[1] * int(batch.kv_lens.sum())
    page_bytes = tokens * batch.query.shape[3] * batch.keys.element_size()
    moved = (2 + (reduction.weight != "none")) * page_bytes + 4 * tokens
    operations = 4 * batch.query[0].numel() * int(batch.kv_lens.sum())
    native, reference = measure_in_turn(
        lambda: window_scores(batch, reduction), lambda: window_scores_reference(batch, reduction), arguments.repeats
    )
    print(f"{arguments.model}, {arguments.requests} requests of {arguments.kv_len} tokens, ", end="")
    print(f"window {arguments.window}, {arguments.reduction}, block size {arguments.block_size}, ", end="")
    print(f"{arguments.dtype}, {arguments.packing} keys, {torch.get_num_threads()} threads")
    print(f"bytes: keys twice{', values once' * (reduction.weight != 'none')}, scores: {moved / 1e6:.2f} MB")
    print(f"operations: logits twice: {operations / 1e6:.1f} M")
    print(f"reached: {shares(native.median, moved, operations)}")
    if arguments.dtype == "bfloat16" and library().kvevict_allow_tiles(1):
        # the exponentials are float32 all the same, and they are what takes the time then
        rate = matrix_rate(torch.bfloat16)
        print(f"AMX: {operations / native.median / rate:.1%} of the bfloat16 matrix rate, {rate / 1e9:.0f} GFLOP/s")
    print(f"native    {native}")
    print(f"reference {reference}, {reference.median / native.median:.1f} times the native time")
    append_row("window_scores", {**vars(arguments), **asdict(reduction)}, native, reference)


def parse_arguments() -> argparse.Namespace:
    """The shape to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--kv-len", type=int, default=8000, help="tokens in the cache of each request")
    parser.add_argument("--window", type=int, default=32, help="queries")
    parser.add_argument("--reduction", choices=REDUCTIONS, default="snapkv", help="that of a policy")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--packing", choices=["transposed", "plain"], default="transposed", help="how a page stores K")
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
