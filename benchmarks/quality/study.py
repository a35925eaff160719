"""Grades of many prompts under many arms: one CSV row per answer, so that a study resumes, and a summary of them."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.serving.engine import MODEL, engine
from benchmarks.timing import RESULTS, provenance
from vllm_kvevict.engine.offline.tasks import TASKS, make_example

from vllm import LLM  # isort: skip  (after the environment is set)
from vllm_kvevict.engine.offline.grading import ForceAnswer, Grade, grade  # isort: skip

METRICS = tuple(field.name for field in fields(Grade))
NUM_RESAMPLES = 2000
KEY = ("task", "length", "question", "policy", "allocator", "kept")


@dataclass(frozen=True)
class Arm:
    """One way to serve a prompt; the whole KV if ``policy`` is "none".

    kept: fraction of the prompt
    """

    policy: str = "none"
    allocator: str = ""
    kept: float = 1.0

    def options(self) -> dict[str, Any]:
        """The options of a request."""
        if self.policy == "none":
            return {"kv_eviction": "none"}
        return {"kv_eviction": self.policy, "kv_budget_allocator": self.allocator, "kv_budget": self.kept}


@dataclass(frozen=True)
class Cell:
    """Prompts of one kind, to be answered under every arm.

    question: "inside" the text that is evicted, or "outside": it follows when the context has been evicted
    """

    task: str
    length: int
    question: str
    num_prompts: int


@contextmanager
def grading_engine(
    model: Path, max_tokens: int, fields: dict[str, Any] | None = None, kv_bytes: int = 1 << 30, **kwargs: Any
) -> Iterator[LLM]:
    """Start an engine that grades, with prefix caching: the arms of one prompt compute its head once.

    fields: of the ``EvictionConfig`` of every arm
    """
    settings = {"kv_cache_memory_bytes": kv_bytes, "max_model_len": max_tokens, "max_num_seqs": 32, **kwargs}
    # policy and budget are defaults that every arm overrides
    with engine(model, 512, fields=fields, logits_processors=[ForceAnswer], **settings) as llm:
        yield llm


def run(
    name: str,
    cells: Sequence[Cell],
    arms: Sequence[Arm],
    model: Path,
    limit: int | None = None,
    fields: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Grade what is missing in benchmarks/results/quality_<name>_prompts.csv, ``limit`` prompts at most.

    A prompt counts as done whichever arms it was graded under. Rows are appended prompt by prompt: a study that was
    interrupted goes on, and two processes may share the cells.

    fields:   of the ``EvictionConfig`` for every arm; without ``num_sink`` and ``num_recent`` what each policy says
    settings: of the engine
    """
    path = RESULTS / f"quality_{name}_prompts.csv"
    done = {(row["task"], int(row["length"]), row["question"], int(row["prompt"])) for row in read(path)}
    todo = [(cell, index) for cell in cells for index in range(cell.num_prompts)]
    todo = [(cell, index) for cell, index in todo if (cell.task, cell.length, cell.question, index) not in done]
    if not todo:
        return
    with grading_engine(model, max(cell.length for cell in cells) + 64, fields, **settings) as llm:
        for cell, index in tqdm(todo[:limit], unit="prompt"):
            example = make_example(model, cell.task, cell.length, index)
            grades = grade(llm, example, [arm.options() for arm in arms], cell.question == "outside")
            rows = [
                {"task": cell.task, "length": cell.length, "question": cell.question, "prompt": index}
                | asdict(arm)
                | {metric: round(value, 5) for metric, value in asdict(graded).items()}
                for arm, graded in zip((Arm(), *arms), grades, strict=True)
            ]
            _append(path, rows)


def summarise(name: str) -> list[dict[str, Any]]:
    """Write benchmarks/results/quality_<name>.csv, a row per cell and arm, from the rows of the prompts; return it.

    Of every metric the mean and a 95 % bootstrap interval over the prompts. Raises ValueError if there are none.
    """
    cells: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in read(RESULTS / f"quality_{name}_prompts.csv"):
        cells.setdefault(tuple(row[key] for key in KEY), []).append(row)
    summary, origin = [], provenance()
    for cell, rows in sorted(cells.items()):
        entry: dict[str, Any] = {**dict(zip(KEY, cell, strict=True)), "prompts": len(rows)}
        for metric in METRICS:
            values = [float(row[metric]) for row in rows]
            low, high = interval(values)
            entry |= {metric: round(float(np.mean(values)), 4), f"{metric}_low": low, f"{metric}_high": high}
        summary.append(origin | entry)
    if not summary:
        raise ValueError(f"--summary-only: nothing has been graded, there are no rows in quality_{name}_prompts.csv")
    with (RESULTS / f"quality_{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, summary[0])
        writer.writeheader()
        writer.writerows(summary)
    return summary


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % percentile bootstrap interval of the mean."""
    return _quantiles(_resampled_means(np.asarray(values), np.random.default_rng(0)))


def compare(name: str, first: Arm, second: Arm, metric: str) -> tuple[float, float, float]:
    """Return by how much ``first`` exceeds ``second`` on the same prompts, and its 95 % interval.

    Cells weigh the same, however many prompts they have. kept: of the arms is not looked at, all fractions count.
    """
    rows = read(RESULTS / f"quality_{name}_prompts.csv")
    by_arm: list[dict[tuple[str, ...], float]] = [
        {
            (row["task"], row["length"], row["question"], row["kept"], row["prompt"]): float(row[metric])
            for row in rows
            if (row["policy"], row["allocator"]) == (arm.policy, arm.allocator)
        }
        for arm in (first, second)
    ]
    cells: dict[tuple[str, ...], list[float]] = {}
    for key in sorted(by_arm[0].keys() & by_arm[1].keys()):  # in order, so that the seed decides
        cells.setdefault(key[:4], []).append(by_arm[0][key] - by_arm[1][key])
    samples = [np.asarray(differences) for _, differences in sorted(cells.items())]
    generator = np.random.default_rng(0)
    means = np.mean([_resampled_means(sample, generator) for sample in samples], axis=0)
    return (float(np.mean([sample.mean() for sample in samples])), *_quantiles(means))


def arm_label(row: dict[str, Any]) -> str:
    """Return how tables and figures call the arm of a row."""
    return "full KV" if row["policy"] == "none" else f"{row['policy']}+{row['allocator']}"


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add_arguments(parser: argparse.ArgumentParser, tasks: Iterable[str], prompts: dict[int, int]) -> None:
    """Add the options of every study: which cells, and how much of them.

    prompts: length -> how many prompts of it
    """
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(tasks))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(prompts))
    parser.add_argument("--prompts", type=int, help=f"of each cell; default, by length: {prompts}")
    parser.add_argument("--limit", type=int, help="grade so many prompts and stop; a later run goes on")
    parser.add_argument("--summary-only", action="store_true", help="only read what has been graded")


def chosen_cells(arguments: argparse.Namespace, prompts: dict[int, int], questions: Iterable[str]) -> list[Cell]:
    """Return the cells that the options choose, short prompts first.

    Raises ValueError for a length of which nobody has said how many prompts it has.
    """
    unknown = [] if arguments.prompts else [length for length in arguments.lengths if length not in prompts]
    if unknown:
        raise ValueError(f"--lengths: expected some of {[*prompts]}, or --prompts as well, got {unknown}")
    return [
        Cell(task, length, question, arguments.prompts or prompts[length])
        for length, task, question in product(arguments.lengths, arguments.tasks, questions)
    ]


def _resampled_means(sample: Any, generator: np.random.Generator) -> Any:
    """Return [NUM_RESAMPLES] float64, means of as many values drawn from ``sample`` [num_values]."""
    return sample[generator.integers(len(sample), size=(NUM_RESAMPLES, len(sample)))].mean(axis=1)


def _quantiles(means: Any) -> tuple[float, float]:
    low, high = np.quantile(means, (0.025, 0.975))
    return round(float(low), 4), round(float(high), 4)


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
