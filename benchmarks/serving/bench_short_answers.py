"""Short answers: from how many tokens on eviction costs a request no time, which is what it needs to be worth while.

One engine serves requests one by one, each prompt once whole and once evicted, in turns, without a prefix cache. An
answer of one token is not evicted at all.

python -m benchmarks.serving.bench_short_answers
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from statistics import median

from vllm import LLM, SamplingParams

from benchmarks.serving.engine import MODEL, engine, random_prompt
from benchmarks.timing import write_row
from vllm_kvevict.commands.arguments import positive

WHOLE = "none"
POLICIES = ("snapkv", "h2o")


def answer(llm: LLM, policy: str, length: int, max_tokens: int, seed: int) -> float:
    """Return the seconds of one request."""
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={"kv_eviction": policy},
    )
    prompt = {"prompt_token_ids": random_prompt(length, seed=seed)}
    begin = time.perf_counter()
    llm.generate([prompt], sampling, use_tqdm=False)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=int, nargs="+", default=[500, 1500, 4000])
    parser.add_argument("--outputs", type=int, nargs="+", default=[2, 4, 8, 32])
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--rounds", type=positive, default=5)
    arguments = parser.parse_args()
    size = {"kv_cache_memory_bytes": 1 << 30, "enable_prefix_caching": False}
    with engine(arguments.model, arguments.budget, **size) as llm:
        for prompt, output in product(arguments.prompts, arguments.outputs):
            seconds: dict[str, list[float]] = {policy: [] for policy in (WHOLE, *POLICIES)}
            for round_ in range(arguments.rounds):
                for policy, measured in seconds.items():
                    measured.append(answer(llm, policy, prompt, output, seed=round_))
            for policy in POLICIES:
                pairs = zip(seconds[policy], seconds[WHOLE], strict=True)
                ratio = median(evicted / whole for evicted, whole in pairs)
                print(
                    f"{prompt:6} tokens, {output:3} of the answer: {policy} takes {ratio:.3f} of a whole request's time"
                )
                row = {"prompt": prompt, "output": output, "budget": arguments.budget, "rounds": arguments.rounds}
                write_row("short_answers", {"policy": policy, **row, "relative_time": round(ratio, 4)})


if __name__ == "__main__":
    main()
