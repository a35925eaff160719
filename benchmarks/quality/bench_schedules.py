"""When to judge a prompt: at its end, by pseudo tokens, by the first tokens of the answer, or chunk by chunk.

The chunks are of 256 tokens, between which a request holds its budget; beside it the same prompts, evicted at their end
by the same engine. Otherwise as ``bench_policies``: all protect the same tokens, share their budget equally, and answer
the same prompts.

python -m benchmarks.quality.bench_schedules
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

from benchmarks.quality.bench_policies import PROTECTED, TASKS
from benchmarks.quality.study import METRICS, Arm, add_arguments, arm_label, chosen_cells, compare, run, summarise
from benchmarks.timing import RESULTS

PROMPTS, PROMPTS_IN_CHUNKS = {1024: 4}, {1024: 2}
KEPT = (0.1, 0.25)
WHOLE, CHUNKED, AT_THE_END = "schedules", "schedules_chunked", "schedules_at_the_end"
AT_ONCE = ("snapkv", "laq", "laq++", "laq_deferred", "keydiff", "tova")
CHUNK_BY_CHUNK = ("snapkv", "keydiff", "tova")
CHUNKS: dict[str, Any] = {"max_num_batched_tokens": 256, "dtype": "float32"}


def arms(policies: tuple[str, ...]) -> list[Arm]:
    """Return an arm for each of these policies and fractions."""
    return [Arm(policy, "uniform", kept) for kept, policy in product(KEPT, policies)]


def _is_begun(name: str) -> bool:
    return (RESULTS / f"quality_{name}_prompts.csv").exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, TASKS, PROMPTS)
    arguments = parser.parse_args()
    cells = chosen_cells(arguments, PROMPTS, ("inside", "outside"))
    if not arguments.summary_only:
        run(WHOLE, cells, arms(AT_ONCE), arguments.model, arguments.limit, PROTECTED)
        cells = chosen_cells(arguments, PROMPTS_IN_CHUNKS, ("inside", "outside"))
        for name, during_prefill in ((CHUNKED, True), (AT_THE_END, False)):
            fields = {**PROTECTED, "during_prefill": during_prefill}
            run(name, cells, arms(CHUNK_BY_CHUNK), arguments.model, arguments.limit, fields, **CHUNKS)
    for name in filter(_is_begun, (WHOLE, CHUNKED, AT_THE_END)):
        means: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in summarise(name):
            means.setdefault((row["question"], row["kept"], arm_label(row)), []).append(row)
        for key, rows in sorted(means.items()):
            print(f"{name:>20} {key[0]:>8} {key[1]:>5} {key[2]:>24}", end="")
            for metric in METRICS:
                print(f"  {metric} {sum(row[metric] for row in rows) / len(rows):.3f}", end="")
            print()
    for metric in METRICS:
        for first, second in (("laq_deferred", "laq"), ("laq", "snapkv"), ("laq++", "snapkv"), ("laq++", "laq")):
            difference = compare(WHOLE, Arm(first, "uniform"), Arm(second, "uniform"), metric)
            print(f"{metric:>12}: {first} over {second} {difference[0]:+.4f}, 95 % from {difference[1:]}")


if __name__ == "__main__":
    main()
