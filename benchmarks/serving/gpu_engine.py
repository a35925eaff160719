"""What a CUDA engine does with and without eviction, from the runs that `tools/gpu` made (docs/gpu.md).

python -m benchmarks.serving.gpu_engine RESULTS.jsonl...

A row per run that ended. Every request asks for log-probabilities, and eager runs bear vLLM's check for waits on the
GPU: compare graphs with graphs. "verdict" names the checks of `python -m tools.gpu compare` that failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.timing import git, write_row
from tools.gpu.compare import checks, verdict_of
from tools.gpu.results import Record, read
from tools.gpu.session import digest_of_sources


def refusal(records: list[Record]) -> str | None:
    """Return why no rows may be written, None if they may."""
    if not records:
        return "no run ended: nothing to write"
    if any(record.dry_run or "gpu" not in record.machine for record in records):
        return "these are runs on a CPU: a row of gpu_engine needs a GPU"
    if any(record.sources != digest_of_sources() for record in records):
        return "other files ran than this checkout has: check out the commit that was run, then write"
    return None


def row_of(record: Record, verdict: str) -> dict[str, object]:
    """Return the columns of a run that ended: the machine it ran on, not this one."""
    measured, machine = record.measured, record.machine
    assert measured is not None
    names = ("machine", "threads", "torch", "vllm", "gpu", "driver", "triton")
    peak = "" if measured.peak_gib is None else round(measured.peak_gib, 2)
    return {
        **{name: machine[name] for name in names},
        "command": record.command,
        "run": record.run.name,
        "worker": measured.worker,
        "runner": measured.runner,
        "attention": measured.attention,
        "graphs": measured.graphs,
        "step_ms": round(measured.step_ms, 3),
        "total_s": round(measured.total_s, 3),
        "start_s": round(measured.start_s, 1),
        "peak_gib": peak,
        "free_start": measured.free_start,
        "free_least": measured.free_least,
        "free_end": measured.free_end,
        "verdict": verdict,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.jsonl of one or more sessions")
    records = read(parser.parse_args().results)
    ended = [record for record in records.values() if record.measured is not None]
    if reason := refusal(ended):
        print(reason)
        return 1
    found = list(checks(records))
    # asked once: the first row makes the tree dirty
    state = {
        "commit": git("rev-parse", "--short", "HEAD"),
        "tree": "dirty" if git("status", "--porcelain") else "clean",
    }
    for record in ended:
        write_row("gpu_engine", {**row_of(record, verdict_of(record.run.name, found)), **state})
    return 0


if __name__ == "__main__":
    sys.exit(main())
