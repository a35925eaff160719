"""Every policy beside the full KV and random choice: needles, a pass key, key-value lists, copying; 2k, the best at 4k.

All policies protect the same tokens (4 first, 32 last) and share their budget equally, so that only the ranking
differs; two more arms are the published pairs that share it otherwise. The question is inside the text that is evicted,
or outside: asked when the context has been evicted already.

python -m benchmarks.quality.bench_policies
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

from benchmarks.quality.study import Arm, add_arguments, arm_label, chosen_cells, run, summarise
from benchmarks.timing import RESULTS
from vllm_kvevict.policies import POLICIES

TASKS = ("needle_noise", "needle_prose", "passkey", "key_value", "copying")
PROMPTS = {2048: 12, 4096: 12}
BEST = ("compactor", "keydiff", "tova", "chunkkv", "knorm")  # by mean log-likelihood over all cells at 2k
KEPT = (0.1, 0.25, 0.5)
PROTECTED = {"num_sink": 4, "num_recent": 32}


def chosen_arms(length: int) -> list[Arm]:
    """Return every policy with equal budgets, and with its own allocator if that is another one; at 4k the best."""
    if length > 2048:
        return [Arm(policy, "uniform", kept) for kept, policy in product(KEPT, BEST)]
    policies = POLICIES.names()
    pairs = [(policy, "uniform") for policy in policies]
    pairs += [(policy, own) for policy in policies if (own := POLICIES.get(policy)().default_allocator) != "uniform"]
    return [Arm(*pair, kept) for kept, pair in product(KEPT, pairs)]


def draw(summary: list[dict[str, Any]], metric: str = "likelihood") -> None:
    """Write benchmarks/results/quality_policies.png: a policy's mean over the tasks at 2k for every fraction kept."""
    import matplotlib.pyplot as plt

    colours = plt.colormaps["tab20"].colors
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for axis, question in zip(axes, ("inside", "outside"), strict=True):
        rows = [row for row in summary if (row["question"], row["length"]) == (question, "2048")]
        means: dict[str, dict[float, list[float]]] = {}
        for row in rows:
            means.setdefault(arm_label(row), {}).setdefault(float(row["kept"]), []).append(row[metric])
        for index, (arm, by_kept) in enumerate(sorted(means.items())):
            points = sorted((kept, sum(values) / len(values)) for kept, values in by_kept.items())
            if arm == "full KV":
                axis.axhline(points[0][1], color="black", linewidth=1, label=arm)
            else:
                style = "solid" if arm.endswith("uniform") else "dashed"
                axis.plot(*zip(*points, strict=True), marker="o", linestyle=style, color=colours[index % 20], label=arm)
        axis.set(title=f"question {question} the evicted text", xlabel="fraction kept", xscale="log")
        axis.set_xticks(KEPT, [f"{kept:.0%}" for kept in KEPT])
        axis.minorticks_off()
    axes[0].set_ylabel("mean log-likelihood of the answer's tokens, nats")
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=7)
    figure.savefig(RESULTS / "quality_policies.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, TASKS, PROMPTS)
    parser.add_argument("--questions", nargs="+", choices=("inside", "outside"), default=["inside", "outside"])
    arguments = parser.parse_args()
    cells = chosen_cells(arguments, PROMPTS, arguments.questions)
    for length in [] if arguments.summary_only else arguments.lengths:
        chosen = [cell for cell in cells if cell.length == length]
        run("policies", chosen, chosen_arms(length), arguments.model, arguments.limit, PROTECTED)
    summary = summarise("policies")
    for row in summary:
        print(
            f"{row['task']:>13} {row['length']:>5} {row['question']:>8} {row['kept']:>5} {arm_label(row):>26} "
            f"{row['prompts']:>3} "
            + " ".join(f"{metric} {row[metric]:.3f}" for metric in ("accuracy", "likelihood", "exact", "divergence"))
        )
    draw(summary)


if __name__ == "__main__":
    main()
