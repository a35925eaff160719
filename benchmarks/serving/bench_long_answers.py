"""Long answers: what a step costs and what a request holds, whole, and with eviction that goes on during decode, in
steps of a block or, with an interval of 1, token by token.

One engine serves every arm, request by request; the arms take turns. Seconds of a step are the mean, since evictions
come once in a block.

python -m benchmarks.serving.bench_long_answers
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import chain, product
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

from vllm import LLM, SamplingParams

from benchmarks.serving.engine import BLOCK_SIZE, MODEL, core, engine, random_prompt
from benchmarks.timing import write_row
from vllm_kvevict.commands.arguments import positive

WHOLE = "none"
BY_BLOCK = ("streaming_llm", "knorm", "tova", "snapkv", "morphkv", "h2o")
BY_TOKEN = ("streaming_llm", "tova", "morphkv", "h2o")


def arms(intervals: Sequence[int]) -> list[tuple[str, int]]:
    """Return the policies that are measured, and their intervals; whole requests first."""
    of_intervals = [product(BY_TOKEN if interval == 1 else BY_BLOCK, (interval,)) for interval in intervals]
    return [(WHOLE, BLOCK_SIZE), *chain.from_iterable(of_intervals)]


def answer(llm: LLM, policy: str, interval: int, arguments: argparse.Namespace, seed: int) -> tuple[float, int]:
    """Serve one batch; return the mean seconds of a step in the second half of the answers, and the most blocks held.

    In that half the budget is full, and every step computes a token of each request.
    """
    options: dict[str, Any] = {"kv_eviction": policy}
    if policy != WHOLE:
        options |= {"kv_evict_during_decode": 1, "kv_evict_interval": interval}
    sampling = SamplingParams(
        temperature=0.0, max_tokens=arguments.output, ignore_eos=True, detokenize=False, extra_args=options
    )
    for index in range(arguments.batch):
        tokens = {"prompt_token_ids": random_prompt(arguments.prompt, seed=seed + index)}
        llm.llm_engine.add_request(f"{seed + index}", tokens, sampling)
    steps, most_blocks = [], 0
    scheduler = core(llm).scheduler
    num_blocks = scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is the null block
    while llm.llm_engine.has_unfinished_requests():
        progress = min((request.num_output_tokens for request in scheduler.requests.values()), default=0)
        begin = time.perf_counter()
        llm.llm_engine.step()
        if progress > arguments.output // 2:
            steps.append(time.perf_counter() - begin)
            free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
            most_blocks = max(most_blocks, num_blocks - free)
    if not steps:
        raise RuntimeError("no step in the second half of the answers decoded a token of every request; raise --output")
    return sum(steps) / len(steps), most_blocks


def median_ratio(some: list[tuple[float, int]], others: list[tuple[float, int]]) -> float:
    """Return the median over the rounds of how the seconds of two arms compare; NaN if the others were not measured."""
    return median([one / other for (one, _), (other, _) in zip(some, others, strict=False)] or [nan])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--output", type=int, default=1000)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument(
        "--interval",
        type=int,
        nargs="+",
        choices=(BLOCK_SIZE, 1),
        default=[BLOCK_SIZE, 1],
        help="tokens of an answer between evictions: those of a block, 1 for token by token, or both in turn (default)",
    )
    parser.add_argument("--rounds", type=positive, default=3)
    arguments = parser.parse_args()
    measured_arms = arms(arguments.interval)
    results: dict[tuple[str, int], list[tuple[float, int]]] = {arm: [] for arm in measured_arms}
    size: dict[str, Any] = {"kv_cache_memory_bytes": 1 << 30, "enable_prefix_caching": False}
    with engine(arguments.model, arguments.budget, **size) as llm:
        for round_ in range(arguments.rounds):
            first = round_ % len(measured_arms)
            for arm in measured_arms[first:] + measured_arms[:first]:
                results[arm].append(answer(llm, *arm, arguments, 1000 * round_))
    settings = {key: value for key, value in vars(arguments).items() if key not in ("model", "interval")}
    for (policy, interval), measured in results.items():
        step = median(seconds for seconds, _ in measured)
        ratio = median_ratio(results[WHOLE, BLOCK_SIZE], measured)
        of_blocks = median_ratio(measured, results.get((policy, BLOCK_SIZE), []))
        tokens = max(blocks for _, blocks in measured) * BLOCK_SIZE / arguments.batch
        print(
            f"{policy:14} {interval:3} {step * 1e3:7.2f} ms a step, {ratio:.2f}x the speed of whole requests, ", end=""
        )
        print(f"{of_blocks:.2f} times the step by blocks, {tokens:.0f} tokens held")
        row = {
            "step_ms": round(step * 1e3, 3),
            "relative_speed": round(ratio, 3),
            "times_step_by_blocks": round(of_blocks, 3),
            "tokens_held": round(tokens),
        }
        write_row("long_answers", {"policy": policy, "interval": interval, **settings, **row})


if __name__ == "__main__":
    main()
