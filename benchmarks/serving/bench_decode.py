"""Decode speed with ragged budgets against uniform ones, the same policy, budget and prompts, interleaved.

python -m benchmarks.serving.bench_decode
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from vllm import LLM, SamplingParams

from benchmarks.serving.engine import MODEL, core, engine, random_prompt
from benchmarks.timing import write_row
from vllm_kvevict.commands.arguments import positive
from vllm_kvevict.config import EvictionConfig


def time_decode(llm: LLM, config: EvictionConfig, arguments: argparse.Namespace, seed: int) -> float:
    """Serve one batch under ``config``; return the median seconds of a step in which every request decodes."""
    core(llm).scheduler._eviction_config = config
    sampling = SamplingParams(temperature=0.0, max_tokens=arguments.output, ignore_eos=True, detokenize=False)
    for index in range(arguments.batch):
        prompt = {"prompt_token_ids": random_prompt(arguments.prompt, seed=seed + index)}
        llm.llm_engine.add_request(f"{config.allocator}-{seed + index}", prompt, sampling)
    steps: list[float] = []
    while llm.llm_engine.has_unfinished_requests():
        requests = list(core(llm).scheduler.requests.values())
        decoding = len(requests) == arguments.batch and all(request.num_output_tokens for request in requests)
        start = time.perf_counter()
        llm.llm_engine.step()
        if decoding:
            steps.append(time.perf_counter() - start)
    if not steps:
        raise RuntimeError("no step decoded a token of every request; raise --output")
    return median(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--policy", default="lava")
    parser.add_argument("--allocators", nargs="+", default=["uniform", "lava"])
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--output", type=int, default=120)
    parser.add_argument("--rounds", type=positive, default=3)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in arguments.allocators}
    with engine(
        arguments.model, arguments.budget, arguments.policy, kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False
    ) as llm:
        for round_ in range(arguments.rounds):
            for name in arguments.allocators:
                config = EvictionConfig(policy=arguments.policy, budget=arguments.budget, allocator=name)
                seconds[name].append(time_decode(llm, config, arguments, seed=1000 * round_))
    baseline = median(seconds[arguments.allocators[0]])
    settings = {key: value for key, value in vars(arguments).items() if key not in ("model", "allocators")}
    for name, values in seconds.items():
        step = median(values)
        print(
            f"{name:10} {step * 1e3:8.2f} ms a step of {arguments.batch}, {baseline / step:.2f}x the speed of the first"
        )
        write_row("decode", {"allocator": name, **settings, "step_ms": step * 1e3, "relative_speed": baseline / step})


if __name__ == "__main__":
    main()
