"""How fast evicted requests decode: against stock vLLM with prompts of the length that was kept, and with whole ones.

A step is one in which every request decodes. Each arm prefills once in a process of its own, after which the arms take
turns for some steps each, after about as many tokens of their answers; vLLM's defaults are on in all of them.

python -m benchmarks.serving.bench_evicted_decode
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serving.engine import BLOCK_SIZE, MODEL, core, engine, random_prompt
from benchmarks.timing import write_row
from vllm_kvevict.commands.arguments import positive

KEPT, WHOLE = "stock vLLM, kept length", "stock vLLM, whole prompts"
EVICTED = {"snapkv + uniform": "uniform", "lava + lava": "lava"}
ARMS = (KEPT, WHOLE, *EVICTED)
SLACK_BLOCKS = 8
MOST_TOKENS = 8192 + BLOCK_SIZE  # of one request, which vLLM insists on
STACK = ExitStack()
RUNNING: list[Any] = []


def start(arm: str, options: argparse.Namespace) -> None:
    """Start this process's engine with room for its requests. An empty VLLM_PLUGINS keeps vLLM from loading plugins."""
    length, answer = (
        (options.kept if arm == KEPT else options.prompt),
        (options.rounds + 2) * options.steps + options.batch,
    )
    held = options.kept if arm in EVICTED else length
    tokens = options.batch * (held + answer + SLACK_BLOCKS * BLOCK_SIZE) + (length if arm in EVICTED else 0)
    settings = {
        "kv_cache_memory_bytes": max(tokens, MOST_TOKENS) * options.token_bytes,
        "dtype": options.dtype,
        "max_num_seqs": options.batch,
    }
    if arm in EVICTED:
        policy = "lava" if EVICTED[arm] == "lava" else "snapkv"
        llm = engine(options.model, options.kept, policy, {"allocator": EVICTED[arm]}, **settings)
    else:
        os.environ["VLLM_PLUGINS"] = ""
        llm = engine(options.model, None, **settings)
    RUNNING.append(STACK.enter_context(llm))


def prefill(arm: str, options: argparse.Namespace) -> float:
    """Prefill this arm's requests; return the blocks that a request holds on average."""
    from vllm import SamplingParams

    (llm,) = RUNNING
    answer = answer_tokens(options)
    sampling = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False)
    for seed in range(options.batch):
        tokens = {"prompt_token_ids": random_prompt(options.kept if arm == KEPT else options.prompt, seed)}
        llm.llm_engine.add_request(str(seed), tokens, sampling)
    scheduler = core(llm).scheduler
    while True:
        llm.llm_engine.step()
        requests = list(scheduler.requests.values())
        if len(requests) != options.batch:
            raise RuntimeError("a request ended before all had begun to decode; raise --steps")
        if all(request.num_output_tokens for request in requests):
            break
    llm.llm_engine.step()  # which gives back what the last eviction freed
    pool = scheduler.kv_cache_manager.block_pool
    return float(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) / options.batch


def decode(options: argparse.Namespace) -> float:
    """Return the median seconds of some steps in which every request decodes."""
    (llm,) = RUNNING
    seconds = []
    for _ in range(options.steps):
        begin = time.perf_counter()
        outputs = llm.llm_engine.step()
        seconds.append(time.perf_counter() - begin)
        if len(outputs) != options.batch:
            raise RuntimeError(f"expected a token of each of {options.batch} requests, got {len(outputs)}")
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=7500)
    parser.add_argument("--kept", type=int, default=1024)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--steps", type=positive, default=12, help="of an arm in a round")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    options.token_bytes = token_bytes(options.model, options.dtype)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = {
            arm: stack.enter_context(ProcessPoolExecutor(1, context, initializer=start, initargs=(arm, options)))
            for arm in ARMS
        }
        for arm in ARMS:
            blocks = processes[arm].submit(prefill, arm, options).result()
            print(f"{arm:26} {blocks:.1f} blocks of {BLOCK_SIZE} tokens a request", flush=True)
            if arm in EVICTED and blocks * BLOCK_SIZE > options.kept + 2 * BLOCK_SIZE:
                raise RuntimeError(f"{arm}: nothing was evicted")
        for round_ in range(options.rounds + 1):
            for arm in ARMS[round_ % len(ARMS) :] + ARMS[: round_ % len(ARMS)]:
                step = processes[arm].submit(decode, options).result()
                if round_:  # the first one warms up
                    seconds[arm].append(step)
    settings = {key: value for key, value in vars(options).items() if key not in ("model", "token_bytes")}
    for arm, steps in seconds.items():
        # round by round, since the machine's speed wanders
        ratios = [
            median(stock / step for stock, step in zip(seconds[other], steps, strict=True)) for other in (KEPT, WHOLE)
        ]
        print(f"{arm:26} {median(steps) * 1e3:7.2f} ms a step, ", end="")
        print(f"{ratios[0]:.3f}x the speed of stock vLLM with {options.kept} tokens, ", end="")
        print(f"{ratios[1]:.2f}x that with {options.prompt}")
        row = {"arm": arm, **settings, "step_ms": round(median(steps) * 1e3, 3)}
        write_row("evicted_decode", row | {"of_kept": round(ratios[0], 4), "of_whole": round(ratios[1], 4)})


def answer_tokens(options: argparse.Namespace) -> int:
    """Return more than a request decodes: the first ones go on while the others prefill, in a few steps each."""
    return int((options.rounds + 2) * options.steps + 8 * options.batch)


def token_bytes(model: Path, dtype: str) -> int:
    """Return what a token takes of the KV cache."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_key_value_heads"] * config.get(
        "head_dim", config["hidden_size"] // config["num_attention_heads"]
    )
    return int(2 * config["num_hidden_layers"] * heads * (4 if dtype == "float32" else 2))


if __name__ == "__main__":
    main()
