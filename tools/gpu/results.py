"""What a GPU session leaves behind: one line of JSON per run in results.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu.runs import Run

RESULTS = "results.jsonl"
Step = list[tuple[int, float]]  # the chosen token and its best rivals, each with its log-probability
Answer = list[Step]


@dataclass(frozen=True)
class Measured:
    """What an engine that served its requests says. Blocks and memory are None where they cannot be seen.

    graphs:   vLLM's graph mode after it has asked the attention backend
    weights:  checksum of the model
    step_ms:  median of the last pass's steps in which every request decodes
    total_s:  of the last pass
    peak_gib: most memory that PyTorch's allocator held
    passes:   the answers of every pass
    """

    worker: str
    runner: str
    graphs: str
    attention: str
    peak_gib: float | None
    weights: str
    build_s: float
    start_s: float
    step_ms: float
    total_s: float
    free_start: int | None
    free_least: int | None
    free_end: int | None
    passes: list[list[Answer]]

    @classmethod
    def parse(cls, read: dict[str, Any]) -> Measured:
        """Return what ``asdict`` and JSON have made of an object; JSON has lists for the tuples of a step."""
        passes = [[[list(map(tuple, step)) for step in answer] for answer in one] for one in read["passes"]]
        return cls(**{**read, "passes": passes})


@dataclass(frozen=True)
class Record:
    """A run as it went.

    status:   "ended", or why there are no measurements: "failed", "timed out", "not started"
    seconds:  of its process
    machine:  what ``machine.describe`` found, {} if that failed
    sources:  digest of the files that ran, by which the commit is found again
    synced:   place -> times vLLM's check saw the CPU wait for the GPU in a step; only eager runs are checked
    compiled: kernels that Triton and others compiled during inference; only runs with graphs are watched
    """

    run: Run
    status: str
    seconds: float
    dry_run: bool
    command: str
    machine: dict[str, Any]
    sources: str
    measured: Measured | None = None
    synced: dict[str, int] = field(default_factory=dict)
    compiled: list[str] = field(default_factory=list)


def append(path: Path, record: Record) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def read(paths: Iterable[Path]) -> dict[str, Record]:
    """Return the records of some files by the names of their runs; the later one counts."""
    records = [_record(json.loads(line)) for path in paths for line in path.read_text().splitlines()]
    return {record.run.name: record for record in records}


def _record(read: dict[str, Any]) -> Record:
    measured = read.pop("measured")
    run = Run(**read.pop("run"))
    return Record(run=run, measured=None if measured is None else Measured.parse(measured), **read)
