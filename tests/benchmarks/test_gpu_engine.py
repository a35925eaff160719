"""Rows of gpu_engine.csv: from runs on a GPU, of this checkout's files, and from nothing else."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import timing
from benchmarks.serving.gpu_engine import main, refusal
from tests.tools.test_gpu_compare import MACHINE, changed, session, write
from tools.gpu.results import Record
from tools.gpu.session import digest_of_sources

VERSIONS = {"machine": "CPU there", "threads": 16, "torch": "2.11", "vllm": "0.32.0", "driver": "580", "triton": "3.6"}


def of_this_checkout() -> dict[str, Record]:
    digest, machine = digest_of_sources(), {**MACHINE, **VERSIONS}
    return {name: replace(record, sources=digest, machine=machine) for name, record in session().items()}


def test_a_row_says_what_ran_where_and_how_it_was_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "benchmarks" / "results")
    timing.RESULTS.parent.mkdir()
    records = changed(of_this_checkout(), "evicted_eager", free_end=99)
    records["evicted_v1"] = replace(records["evicted_v1"], status="timed out", measured=None)
    monkeypatch.setattr(sys, "argv", ["gpu_engine", write(records, tmp_path)])
    assert main() == 0
    with (timing.RESULTS / "gpu_engine.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == [name for name in records if name != "evicted_v1"]
    row = rows["evicted_eager"]
    expected = {**VERSIONS, "gpu": "GPU", "command": "command", "worker": "EvictionGPUWorker", "graphs": "NONE"}
    expected |= {"step_ms": 5.0, "total_s": 1.0, "peak_gib": 1.0, "free_start": 100, "free_least": 80, "free_end": 99}
    assert {name: row[name] for name in expected} == {name: str(value) for name, value in expected.items()}
    assert "evicted_eager, free blocks" in row["verdict"]
    assert rows["stock_eager"]["verdict"] == "ok"
    assert rows["evicted_core_process"]["free_end"] == ""
    assert {row["tree"] for row in rows.values()} <= {"clean", "dirty"}


def test_a_dry_run_makes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    records = {name: replace(record, dry_run=True) for name, record in of_this_checkout().items()}
    monkeypatch.setattr(sys, "argv", ["gpu_engine", write(records, tmp_path)])
    assert main() == 1
    assert not timing.RESULTS.exists()


def test_rows_are_refused_with_the_reason() -> None:
    records = list(of_this_checkout().values())
    assert refusal(records) is None
    assert refusal([]) == "no run ended: nothing to write"
    assert "needs a GPU" in str(refusal([replace(records[0], machine={})]))
    assert "check out the commit that was run" in str(refusal([replace(records[0], sources="other")]))
