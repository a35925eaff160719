"""What the benchmarks share: measuring, and the CSV row that says where a number comes from."""

import csv
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the 20th and 80th percentile beside it."""

    median: float
    p20: float
    p80: float

    def __str__(self) -> str:
        return f"{self.median * 1e3:8.3f} ms (p20 {self.p20 * 1e3:.3f}, p80 {self.p80 * 1e3:.3f})"


def measure(call: Callable[[], object], repeats: int) -> Timing:
    """Time ``repeats`` calls one by one, after a tenth as many (at least 2) that do not count."""
    return _measure([call], repeats)[0]


def measure_in_turn(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[Timing, Timing]:
    """Time two calls as ``measure`` does, one after the other in each round, so that both meet the same machine."""
    timings = _measure([first, second], repeats)
    return timings[0], timings[1]


def _measure(calls: list[Callable[[], object]], repeats: int) -> list[Timing]:
    seconds: list[list[float]] = [[] for _ in calls]
    num_warm_up = max(2, repeats // 10)
    for round_ in range(num_warm_up + repeats):
        for call, of_call in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if round_ >= num_warm_up:
                of_call.append(time.perf_counter() - start)
    fifths = [statistics.quantiles(of_call, n=5) for of_call in seconds]
    return [Timing(statistics.median(s), f[0], f[3]) for s, f in zip(seconds, fifths, strict=True)]


def append_row(name: str, row: dict[str, object], native: Timing, reference: Timing) -> None:
    """Add a row to benchmarks/results/<name>.csv: provenance, ``row``, then both timings in milliseconds."""
    timings = {
        f"{label}_{field}_ms": round(getattr(timing, field) * 1e3, 4)
        for label, timing in (("native", native), ("reference", reference))
        for field in ("median", "p20", "p80")
    }
    write_row(name, {**row, **timings})


def write_row(name: str, row: dict[str, object]) -> None:
    """Add a row to benchmarks/results/<name>.csv, behind what says where it comes from; it may have new columns."""
    full = {**provenance(), **row}
    path = RESULTS / f"{name}.csv"
    RESULTS.mkdir(exist_ok=True)
    rows: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [dict(earlier) for earlier in csv.DictReader(file)]
    columns = dict.fromkeys([*(rows[0] if rows else []), *full])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows([*rows, full])
    print(f"row added to {path.relative_to(RESULTS.parents[1])}")


def provenance() -> dict[str, object]:
    """The machine, the software and the state of the checkout."""
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vllm": _vllm_version(),
        "commit": git("rev-parse", "--short", "HEAD") or "none",
        "tree": "dirty" if git("status", "--porcelain") else "clean",
    }


def _vllm_version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:  # kernels need none
        return "none"


def machine() -> str:
    """The processor's name and the widest vectors that torch found, which our kernels use too."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return f"{named[1] if named else platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def git(*arguments: str) -> str:
    """The output of a git command in this checkout; empty if it fails."""
    done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
