"""What an eviction costs: score + allocate + select + compact as a share of the prefill they end.

python -m benchmarks.serving.bench_eviction_cost
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from vllm import LLM, SamplingParams

from benchmarks.serving.engine import MODEL, core, engine, random_prompt
from benchmarks.timing import write_row


def time_prefill(llm: LLM, length: int, seed: int) -> tuple[float, float]:
    """Return seconds until the first token, and the seconds of it that the eviction took."""
    bridge = core(llm).model_executor.driver_worker.worker.eviction
    taken: list[float] = []
    end_step = bridge.end_step

    def record() -> dict[str, object]:
        reports = end_step()
        taken.extend(report.seconds for report in reports.values())
        return reports

    bridge.end_step = record
    start = time.perf_counter()
    llm.generate(
        {"prompt_token_ids": random_prompt(length, seed)},
        SamplingParams(temperature=0.0, max_tokens=1, detokenize=False),
        use_tqdm=False,
    )
    seconds = time.perf_counter() - start
    del bridge.end_step
    if len(taken) != 1:
        raise RuntimeError(f"expected one eviction, got {len(taken)}")
    return seconds, taken[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000, 8000])
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{'prompt':>7} {'prefill s':>10} {'eviction ms':>12} {'share':>7}")
    with engine(arguments.model, arguments.budget, kv_cache_memory_bytes=1 << 30) as llm:
        time_prefill(llm, 1000, seed=0)  # warm up
        runs: dict[int, list[tuple[float, float]]] = {length: [] for length in arguments.lengths}
        for repeat in range(arguments.repeats):  # interleaved: the machine is noisy
            for length in arguments.lengths:
                runs[length].append(time_prefill(llm, length, seed=1 + repeat * 10_000 + length))
    for length, pairs in runs.items():
        prefill, eviction = (median(values) for values in zip(*pairs, strict=True))
        share = median(taken / total for total, taken in pairs)
        print(f"{length:7} {prefill:10.2f} {eviction * 1e3:12.1f} {share:7.1%}")
        row = {"prompt": length, "budget": arguments.budget, "prefill_s": prefill, "eviction_s": eviction}
        write_row("eviction_cost", {**row, "share": share, "repeats": arguments.repeats})


if __name__ == "__main__":
    main()
