"""How many requests decode at once in the same KV memory: stock vLLM against a budget.

python -m benchmarks.serving.bench_concurrency
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean

from vllm import SamplingParams

from benchmarks.serving.engine import BLOCK_SIZE, MODEL, core, engine, random_prompt
from benchmarks.timing import write_row


def run(model: Path, budget: int | None, arguments: argparse.Namespace) -> dict[str, float]:
    """Send all prompts at once; return requests decoding at once (most, mean), preemptions and seconds."""
    num_blocks = arguments.memory // BLOCK_SIZE + 1  # and the null block
    decoding, preempted = [], 0
    settings = {"num_gpu_blocks_override": num_blocks, "max_model_len": arguments.prompt + arguments.output}
    with engine(model, budget, kv_cache_memory_bytes=1 << 30, max_num_seqs=32, **settings) as llm:
        sampling = SamplingParams(temperature=0.0, max_tokens=arguments.output, ignore_eos=True, detokenize=False)
        for index in range(arguments.requests):
            prompt = {"prompt_token_ids": random_prompt(arguments.prompt, seed=index)}
            llm.llm_engine.add_request(str(index), prompt, sampling)
        requests = dict(core(llm).scheduler.requests)
        finished, start = 0, time.perf_counter()
        while llm.llm_engine.has_unfinished_requests():
            finished += sum(output.finished for output in llm.llm_engine.step())
            running = core(llm).scheduler.running
            decoding.append(sum(not request.is_prefill_chunk for request in running))
        seconds = time.perf_counter() - start
        preempted = sum(request.num_preemptions for request in requests.values())
    if finished != arguments.requests:
        raise RuntimeError(f"{finished} of {arguments.requests} requests finished")
    return {"most": max(decoding), "mean": mean(decoding), "preemptions": preempted, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--memory", type=int, default=12_000, help="KV memory in tokens")
    parser.add_argument("--prompt", type=int, default=4_000, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--budget", type=int, default=256)
    arguments = parser.parse_args()
    results = {
        name: run(arguments.model, budget, arguments)
        for name, budget in [("stock", None), ("snapkv", arguments.budget)]
    }
    print(f"{'':8} {'decoding at once':>17} {'mean':>6} {'preemptions':>12} {'seconds':>8}")
    for name, row in results.items():
        print(f"{name:8} {row['most']:17.0f} {row['mean']:6.1f} {row['preemptions']:12.0f} {row['seconds']:8.1f}")
    print(f"ratio of requests decoding at once: {results['snapkv']['most'] / results['stock']['most']:.2f}")
    settings = {key: value for key, value in vars(arguments).items() if key != "model"}
    for name, row in results.items():
        write_row("concurrency", {"engine": name, **settings, **row})


if __name__ == "__main__":
    main()
