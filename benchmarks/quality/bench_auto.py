"""``--kv-budget auto`` on prompts that nothing of its calibration has seen, beside fixed fractions.

Quality is that of the calibration: the log-likelihood of the answer with all of the prompt over the one with what is
kept.

kvevict calibrate --model .cache/models/SmolLM2-135M-Instruct --kv-eviction compactor \
    --prompt-tokens 640 --prompts 12 --kept 0.3 0.5 0.65 0.8 0.9 --out benchmarks/results/calibration.json \
    --points benchmarks/results/calibration_points.csv \
    --dtype float32 --enforce-eager --kv-cache-memory-bytes 536870912
python -m benchmarks.quality.bench_auto
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.quality.study import grading_engine, interval
from benchmarks.serving.engine import MODEL
from benchmarks.timing import RESULTS, provenance
from vllm_kvevict.engine.offline.tasks import TASKS, make_example
from vllm_kvevict.eviction.record import recorded_evictions

from vllm_kvevict.engine.offline.grading import grade  # isort: skip  (after the environment is set)

FRACTIONS = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
TARGETS = (0.9, 0.95)
FIRST_UNSEEN = 20  # of each task


def measure(model: Path, policy: str, calibration: Path, num_tokens: int, num_prompts: int) -> list[dict[str, Any]]:
    """Return a row for every held-out prompt and arm: what was kept of it, and the quality that was left."""
    constants = json.loads(calibration.read_text())["policies"][policy]
    rows = []
    for target in TARGETS:
        fields = {"calibration": {policy: constants}, "budget_target": target}
        with grading_engine(model, num_tokens + 64, fields, policy=policy, dtype="float32") as llm:
            fixed = FRACTIONS if target == TARGETS[0] else ()
            arms = [("auto", target), *(("fixed", kept) for kept in fixed)]
            options = [{"kv_budget": "auto" if name == "auto" else value} for name, value in arms]
            examples = [(task, FIRST_UNSEEN + index) for index in range(num_prompts) for task in TASKS]
            for task, index in tqdm(examples, unit="prompt", desc=f"target {target}"):
                example = make_example(model, task, num_tokens, index)
                with recorded_evictions() as records:
                    full, *parts = grade(llm, example, options)
                # prompts of one length are served in order
                for (name, value), part, record in zip(arms, parts, records, strict=True):
                    kept = record.plan.num_kept_tokens / record.plan.num_tokens
                    if name == "fixed" and abs(kept - value) > 64 / num_tokens:  # two blocks
                        raise RuntimeError(f"{task} {index}: {kept} was kept where {value} was asked for")
                    quality = part.quality(full)
                    rows.append(
                        {"task": task, "prompt": index, "arm": name, "setting": value}
                        | {"kept": round(kept, 4), "quality": round(quality, 4), "accuracy": round(part.accuracy, 4)}
                    )
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for every arm: means over the prompts, and 95 % bootstrap intervals."""
    by_arm: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault((row["arm"], row["setting"]), []).append(row)
    summary = []
    for (arm, setting), of_arm in sorted(by_arm.items()):
        entry: dict[str, Any] = {**provenance(), "arm": arm, "setting": setting, "prompts": len(of_arm)}
        for metric in ("kept", "quality", "accuracy"):
            values = [row[metric] for row in of_arm]
            low, high = interval(values)
            entry |= {metric: round(float(np.mean(values)), 4), f"{metric}_low": low, f"{metric}_high": high}
        summary.append(entry)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--policy", default="compactor")
    parser.add_argument("--calibration", type=Path, default=RESULTS / "calibration.json")
    parser.add_argument("--prompt-tokens", type=int, default=640)
    parser.add_argument("--prompts", type=int, default=8, help="of each task")
    arguments = parser.parse_args()
    rows = measure(arguments.model, arguments.policy, arguments.calibration, arguments.prompt_tokens, arguments.prompts)
    for name, table in (("quality_auto_prompts", rows), ("quality_auto", summarise(rows))):
        with (RESULTS / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    for row in table:
        print(f"{row['arm']:>6} {row['setting']:.2f}: kept {row['kept']:.3f}, quality {row['quality']:.3f} "
              f"({row['quality_low']:.3f} to {row['quality_high']:.3f}), accuracy {row['accuracy']:.3f}")  # fmt: skip
    for target in TARGETS:
        enough = [row for row in table if row["arm"] == "fixed" and row["quality"] >= target]
        (auto,) = (row for row in table if (row["arm"], row["setting"]) == ("auto", target))
        least = min((row["kept"] for row in enough), default=None)
        print(f"target {target}: auto keeps {auto['kept']:.3f} for {auto['quality']:.3f}; fixed needs {least}")


if __name__ == "__main__":
    main()
