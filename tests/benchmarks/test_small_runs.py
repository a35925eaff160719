"""The serving benchmarks and the studies that the pages quote, each at about its smallest sizes: it ends, evicts, and
writes rows of plausible numbers, into a folder of the test.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.report import PROVENANCE, read, results_of
from tests.conftest import ROOT
from vllm_kvevict.policies import POLICIES

pytestmark = pytest.mark.for_release("each starts engines; what they share is tested in `make test`")
Row = dict[str, float | str]
MEASURED = re.compile("seconds|_ms$|_s$|speed|time|share|^of_")  # these are more than 0


@dataclass(frozen=True)
class SmallRun:
    """The options of a script, and whether its rows are plausible.

    evicts: in this process; other scripts start processes of their own
    """

    options: str
    is_plausible: Callable[[list[Row]], bool]
    evicts: bool = True


def tells_evicted_from_full(rows: list[Row]) -> bool:
    """Whether a study's answers change with the eviction, and with nothing else."""
    full = [row["divergence"] for row in rows if row["policy"] == "none"]
    return (
        set(full) == {0} and max(row["divergence"] for row in rows) > 0 and all(row["likelihood"] < 0 for row in rows)
    )


RUNS = {
    "benchmarks.serving.bench_concurrency": SmallRun(
        "--memory 512 --prompt 300 --output 40 --requests 4 --budget 64",
        lambda rows: rows[0]["most"] < rows[1]["most"] <= 4,
    ),
    "benchmarks.serving.bench_decode": SmallRun(
        "--batch 2 --prompt 200 --output 4 --rounds 1 --budget 64", lambda rows: len(rows) == 2
    ),
    "benchmarks.serving.bench_evicted_decode": SmallRun(  # which looks itself whether it evicts
        "--batch 2 --prompt 300 --kept 64 --rounds 1 --steps 4", lambda rows: len(rows) == 4, evicts=False
    ),
    "benchmarks.serving.bench_eviction_cost": SmallRun(
        "--policies all --lengths 400 --budget 160 --repeats 1",
        lambda rows: {row["policy"] for row in rows} == {*POLICIES.names()},
    ),
    "benchmarks.serving.bench_long_answers": SmallRun(
        "--batch 1 --prompt 100 --output 40 --budget 96 --rounds 1",
        lambda rows: all(row["tokens_held"] == (160 if row["policy"] == "none" else 96) for row in rows),
    ),
    "benchmarks.serving.bench_multi_turn": SmallRun(
        "--chats 1 --turns 2 --system 600 --user 40 --output 2",
        lambda rows: all(0 < row["computed_tokens"] < row["prompt_tokens"] == 682 for row in rows),
    ),
    "benchmarks.serving.bench_overhead": SmallRun(  # which looks itself whether all arms answer the same
        "--batch 2 --prompt 100 --output 4 --rounds 1", lambda rows: len(rows) == 3, evicts=False
    ),
    "benchmarks.serving.bench_short_answers": SmallRun(
        "--prompts 200 --outputs 2 --budget 64 --rounds 1", lambda rows: len(rows) == 2
    ),
    "benchmarks.quality.bench_allocators": SmallRun(
        "--tasks passkey --lengths 320 --prompts 1", tells_evicted_from_full
    ),
    "benchmarks.quality.bench_auto": SmallRun(
        "--prompt-tokens 320 --prompts 1",
        lambda rows: all(0 < row["kept"] < 1 for row in rows if row["arm"] == "fixed") and len(rows) == 10,
    ),
    "benchmarks.quality.bench_policies": SmallRun(
        "--tasks passkey --lengths 320 --prompts 1 --questions inside",
        lambda rows: tells_evicted_from_full(rows) and {row["policy"] for row in rows} == {"none", *POLICIES.names()},
    ),
    "benchmarks.quality.bench_schedules": SmallRun(
        "--tasks passkey --lengths 320 --prompts 1", tells_evicted_from_full
    ),
}


def value_of(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize("script", RUNS)
def test_a_small_run_ends_with_plausible_rows(
    script: str,
    model: Path,
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept_masks: list[torch.Tensor],
) -> None:
    run = RUNS[script]
    monkeypatch.setattr(sys, "argv", [script, "--model", str(model), *run.options.split()])
    assert not importlib.import_module(script).main()
    files = results_of(ROOT / f"{script.replace('.', '/')}.py", results)
    rows: list[Row] = [
        {name: value_of(text) for name, text in row.items() if name not in PROVENANCE}
        for file in files
        for row in read(file)
    ]
    numbers = [(name, value) for row in rows for name, value in row.items() if isinstance(value, float)]
    assert not [(name, value) for name, value in numbers if not math.isfinite(value)]
    assert not [(name, value) for name, value in numbers if MEASURED.search(name) and value <= 0]
    assert rows and run.is_plausible(rows), rows
    assert any(not kept.all() for kept in kept_masks) == run.evicts


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("benchmarks.serving.bench_eviction_cost", "--lengths 60 --budget 64 --repeats 1", "60 tokens 0 times"),
        ("benchmarks.serving.bench_decode", "--batch 1 --prompt 60 --output 1 --rounds 1", "raise --output"),
        ("benchmarks.serving.bench_long_answers", "--batch 1 --prompt 60 --output 1 --rounds 1", "raise --output"),
        (
            "benchmarks.quality.bench_policies",
            "--lengths 320",
            "--lengths: expected some of .2048, 4096., or --prompts",
        ),
        ("benchmarks.quality.bench_allocators", "--summary-only", "nothing has been graded"),
    ],
)
def test_sizes_too_small_to_measure_are_named(
    script: str, options: str, message: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--model", str(model), *options.split()])
    with pytest.raises((RuntimeError, ValueError), match=message):
        importlib.import_module(script).main()


def test_one_turn_of_a_chat_is_too_few(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_multi_turn", "--turns", "1"])
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.serving.bench_multi_turn").main()
    assert "--turns: expected at least 2" in capsys.readouterr().err
