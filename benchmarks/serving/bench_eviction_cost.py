"""What an eviction costs: observe + score + allocate + select + compact as a share of the prefill they belong to.

And the memory that each policy says scoring takes, per token of the prompt.

python -m benchmarks.serving.bench_eviction_cost [--policies all]
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from math import isnan, nan
from pathlib import Path
from statistics import median

from vllm import LLM, SamplingParams

from benchmarks.serving.engine import MODEL, core, engine, random_prompt
from benchmarks.timing import write_row
from vllm_kvevict.commands.arguments import positive
from vllm_kvevict.policies import POLICIES


def time_prefill(llm: LLM, policy: str, length: int, seed: int) -> tuple[float, float]:
    """Return seconds until the first token, and the seconds that the eviction took, which are part of them unless the
    policy waits for tokens of the answer.
    """
    bridge = core(llm).model_executor.driver_worker.worker.eviction
    taken: list[float] = []
    end_step = bridge.end_step

    def record() -> dict[str, object]:
        reports = end_step()
        taken.extend(report.seconds for report in reports.values())
        return reports

    bridge.end_step = record
    # an answer of one token is not evicted at all
    max_tokens = 2 + POLICIES.get(policy)().num_deferred
    sampling = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args={"kv_eviction": policy}
    )
    start, first = time.perf_counter(), nan
    llm.llm_engine.add_request(f"{policy}-{seed}", {"prompt_token_ids": random_prompt(length, seed)}, sampling)
    while llm.llm_engine.has_unfinished_requests():
        if llm.llm_engine.step() and isnan(first):
            first = time.perf_counter()
    del bridge.end_step
    if len(taken) != 1:
        raise RuntimeError(f"{policy} evicted a prompt of {length} tokens {len(taken)} times; is it above the budget?")
    return first - start, taken[0]


def bytes_per_token(llm: LLM, policy: str) -> tuple[int, int]:
    """Return what the policy says it holds for each token: for all layers while the prompt passes, and for one."""
    config = llm.llm_engine.vllm_config.model_config
    parallel = llm.llm_engine.vllm_config.parallel_config
    sizes = config.get_num_attention_heads(parallel), config.get_num_kv_heads(parallel), config.get_head_size()
    method = POLICIES.get(policy)()
    return method.state_bytes(*sizes) * config.get_num_layers(parallel), method.scratch_bytes(*sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--policies", nargs="+", default=["snapkv"], help="names, or 'all'")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000, 8000])
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--dtype", default="auto", help="of the model: float32 is faster on CPUs without bfloat16")
    arguments = parser.parse_args()
    policies = POLICIES.names() if arguments.policies == ["all"] else arguments.policies
    runs: dict[tuple[str, int], list[tuple[float, float]]] = {}
    settings = {"kv_cache_memory_bytes": 2 << 30, "enable_prefix_caching": False, "dtype": arguments.dtype}
    with engine(arguments.model, arguments.budget, **settings) as llm:
        for policy in policies:
            time_prefill(llm, policy, arguments.lengths[0], seed=0)  # warm up
        for repeat in range(arguments.repeats):  # interleaved: the machine is noisy
            for policy, length in product(policies, arguments.lengths):
                seconds = time_prefill(llm, policy, length, seed=1 + repeat * 10_000 + length)
                runs.setdefault((policy, length), []).append(seconds)
        memory = {policy: bytes_per_token(llm, policy) for policy in policies}
    print(f"{'policy':>20} {'prompt':>7} {'prefill s':>10} {'eviction ms':>12} {'share':>7} {'bytes/token':>12}")
    for (policy, length), pairs in runs.items():
        prefill, eviction = (median(values) for values in zip(*pairs, strict=True))
        share = median(taken / total for total, taken in pairs)
        state, scratch = memory[policy]
        row = {"policy": policy, "prompt": length, "budget": arguments.budget, "prefill_s": prefill}
        row |= {"eviction_s": eviction, "share": share, "state_bytes_per_token": state}
        row |= {"scratch_bytes_per_token": scratch, "repeats": arguments.repeats, "dtype": arguments.dtype}
        print(f"{policy:>20} {length:7} {prefill:10.2f} {eviction * 1e3:12.1f} {share:7.1%} {state + scratch:12}")
        write_row("eviction_cost", row)


if __name__ == "__main__":
    main()
