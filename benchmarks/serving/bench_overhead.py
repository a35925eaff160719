"""What the plugin costs where nothing is evicted: steps of stock vLLM, with eviction off, and with an ample budget.

A step is one in which every request decodes; an ample budget holds every prompt. Three engines in processes of their
own take turns; prefix caching and all of vLLM's defaults are on.

python -m benchmarks.serving.bench_overhead
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serving.engine import MODEL, core, engine, random_prompt
from benchmarks.timing import write_row
from vllm_kvevict.commands.arguments import positive

ARMS = ("stock vLLM", "eviction off", "budget above every prompt")
STACK = ExitStack()
RUNNING: list[Any] = []


def start(arm: str, model: Path, prompt: int) -> None:
    """Start this process's engine. An empty VLLM_PLUGINS keeps vLLM from loading any plugin."""
    if arm == "stock vLLM":
        os.environ["VLLM_PLUGINS"] = ""
    budget = prompt if arm == "budget above every prompt" else None
    RUNNING.append(STACK.enter_context(engine(model, budget, kv_cache_memory_bytes=1 << 29)))


def decode(batch: int, prompt: int, output: int, seed: int) -> tuple[float, list[list[int]]]:
    """Serve one batch; return the median seconds of a step in which every request decodes, and the answers."""
    from vllm import SamplingParams

    (llm,) = RUNNING
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
    for index in range(batch):
        tokens = {"prompt_token_ids": random_prompt(prompt, seed=seed + index)}
        llm.llm_engine.add_request(f"{seed + index}", tokens, sampling)
    steps, answers = [], {}
    while llm.llm_engine.has_unfinished_requests():
        requests = list(core(llm).scheduler.requests.values())
        is_decoding = len(requests) == batch and all(request.num_output_tokens for request in requests)
        begin = time.perf_counter()
        outputs = llm.llm_engine.step()
        if is_decoding:
            steps.append(time.perf_counter() - begin)
        answers |= {output.request_id: list(output.outputs[0].token_ids) for output in outputs if output.finished}
    if not steps:
        raise RuntimeError("no step decoded a token of every request; raise --output")
    return median(steps), [answers[name] for name in sorted(answers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=500)
    parser.add_argument("--output", type=int, default=100)
    parser.add_argument("--rounds", type=positive, default=9)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = {
            arm: stack.enter_context(
                ProcessPoolExecutor(1, context, initializer=start, initargs=(arm, arguments.model, arguments.prompt))
            )
            for arm in ARMS
        }
        for round_ in range(arguments.rounds + 1):
            answers = []
            for arm in ARMS[round_ % len(ARMS) :] + ARMS[: round_ % len(ARMS)]:
                call = (arguments.batch, arguments.prompt, arguments.output, 1000 * round_)
                step, tokens = processes[arm].submit(decode, *call).result()
                answers.append(tokens)
                if round_:  # the first one warms up
                    seconds[arm].append(step)
            if answers != [answers[0]] * len(ARMS):
                raise RuntimeError("the arms answered differently; their times mean nothing")
    settings = {key: value for key, value in vars(arguments).items() if key != "model"}
    for arm, steps in seconds.items():
        # step by step against the stock step of the same round, since the machine's speed wanders
        ratio = median(stock / step for stock, step in zip(seconds[ARMS[0]], steps, strict=True))
        print(f"{arm:26} {median(steps) * 1e3:7.2f} ms a step, {ratio:.3f}x the speed of stock vLLM")
        row = {"arm": arm, **settings, "step_ms": round(median(steps) * 1e3, 3), "relative_speed": round(ratio, 4)}
        write_row("overhead", row)


if __name__ == "__main__":
    main()
