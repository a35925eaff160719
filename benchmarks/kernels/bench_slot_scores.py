"""Time slot_scores against its reference: python -m benchmarks.kernels.bench_slot_scores."""

import argparse

import torch

from benchmarks.kernels.bench_window_scores import MODELS
from benchmarks.limits import shares
from benchmarks.timing import append_row, measure_in_turn
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.slot_scores import FUSION_CODES, GROUP_CODES, SlotBatch, slot_scores, slot_scores_reference


def setup(arguments: argparse.Namespace) -> SlotBatch:
    """One layer's random inputs: what each head holds stands in no order in scrambled pages, some queries follow it."""
    torch.manual_seed(0)
    model, dtype, block_size = MODELS[arguments.model], getattr(torch, arguments.dtype), arguments.block_size
    shape = (arguments.requests, model.num_kv_heads, arguments.budget // block_size)
    num_owned = shape[0] * shape[1] * shape[2]
    keys = torch.randn(2 * num_owned, model.head_size, block_size).to(dtype).transpose(1, 2)
    if arguments.packing == "plain":
        keys = keys.contiguous()
    page_table = torch.randperm(2 * num_owned)[:num_owned].view(shape)
    num_slots = shape[2] * block_size
    positions = torch.stack([torch.randperm(num_slots) for _ in range(shape[0] * shape[1])]).view(*shape[:2], num_slots)
    query = torch.randn(arguments.requests, arguments.queries, model.num_heads, model.head_size).to(dtype)
    last_seen = torch.full((arguments.requests, arguments.queries), num_slots - arguments.queries)
    return SlotBatch(query, keys, page_table, positions, last_seen, model.head_size**-0.5)


def check(batch: SlotBatch, arguments: argparse.Namespace) -> None:
    """Raise unless the compiled kernel is there and agrees with the reference on these very inputs."""
    if library() is None:
        raise SystemExit("nothing to time: the CPU kernels are not built")
    # the tolerance and its reason are those of tests/kernels/test_window_scores.py
    reductions = arguments.group, arguments.fusion
    expected = slot_scores_reference(batch, *reductions)
    torch.testing.assert_close(slot_scores(batch, *reductions), expected, rtol=1e-5, atol=1e-9)


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print and append a CSV row."""
    batch, reductions = setup(arguments), (arguments.group, arguments.fusion)
    check(batch, arguments)
    slots = batch.positions.numel()
    moved = slots * (batch.query.shape[3] * batch.keys.element_size() + batch.positions.element_size() + 4)
    operations = 2 * batch.query[0].numel() * arguments.requests * batch.positions.shape[2]
    native, reference = measure_in_turn(
        lambda: slot_scores(batch, *reductions), lambda: slot_scores_reference(batch, *reductions), arguments.repeats
    )
    print(f"{arguments.model}, {arguments.requests} requests of {arguments.budget} tokens a head, ", end="")
    print(f"{arguments.queries} queries, {arguments.group} of the group, {arguments.fusion} of the queries, ", end="")
    print(f"block size {arguments.block_size}, {arguments.dtype}, {arguments.packing} keys, ", end="")
    print(f"{torch.get_num_threads()} threads")
    print(f"reached: {shares(native.median, moved, operations)}")
    print(f"native    {native}")
    print(f"reference {reference}, {reference.median / native.median:.1f} times the native time")
    append_row("slot_scores", vars(arguments), native, reference)


def parse_arguments() -> argparse.Namespace:
    """The shape to time, as command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--budget", type=int, default=256, help="tokens that each head holds")
    parser.add_argument("--queries", type=int, default=32, help="1 is what h2o and tova look at, 32 morphkv")
    parser.add_argument("--group", choices=GROUP_CODES, default="max", help="over the query heads of a KV head")
    parser.add_argument("--fusion", choices=FUSION_CODES, default="sum", help="over the queries")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--packing", choices=["transposed", "plain"], default="transposed", help="how a page stores K")
    parser.add_argument("--repeats", type=int, default=100)
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
