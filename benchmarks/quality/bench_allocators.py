"""Retrieval with ragged budgets against equal ones: needles, several keys, key-value lists, the question at the end.

python -m benchmarks.quality.bench_allocators
"""

from __future__ import annotations

import argparse
from itertools import product

from benchmarks.quality.study import Arm, add_arguments, arm_label, chosen_cells, compare, run, summarise

TASKS = ("needle_noise", "needle_prose", "multikey", "key_value")
PROMPTS = {1024: 50, 2048: 50, 4096: 20}
KEPT = (0.05, 0.1, 0.2)
METHODS = (("snapkv", "uniform"), ("snapkv", "adakv"), ("lava", "lava"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, TASKS, PROMPTS)
    arguments = parser.parse_args()
    arms = [Arm(*method, kept) for kept, method in product(KEPT, METHODS)]
    if not arguments.summary_only:
        run("allocators", chosen_cells(arguments, PROMPTS, ["inside"]), arms, arguments.model, arguments.limit)
    print(f"{'task':>13} {'length':>6} {'kept':>5} {'arm':>16} {'prompts':>7} {'accuracy':>22} {'log-likelihood':>26}")
    for row in summarise("allocators"):
        accuracy, likelihood = (
            f"{row[metric]:.3f} [{row[metric + '_low']:.3f}, {row[metric + '_high']:.3f}]"
            for metric in ("accuracy", "likelihood")
        )
        print(
            f"{row['task']:>13} {row['length']:>6} {row['kept']:>5} {arm_label(row):>16} {row['prompts']:>7} "
            f"{accuracy:>22} {likelihood:>26}"
        )
    for method, metric in product(METHODS[1:], ("accuracy", "likelihood")):
        mean, low, high = compare("allocators", Arm(*method), Arm(*METHODS[0]), metric)
        print(f"{'+'.join(method)} minus {'+'.join(METHODS[0])}, {metric}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]")


if __name__ == "__main__":
    main()
