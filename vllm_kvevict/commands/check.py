"""The command ``check``: whether the package works on this machine."""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

_PARTS = ("machine", "stock", "evicting")
_MODULE = "vllm_kvevict.engine.offline.check"
_MOST_SECONDS = 300  # of a part
_LOG_LINES = 5
_CPU_SPACE, _CPU_GIB = "VLLM_CPU_KVCACHE_SPACE", "1"


@dataclass(frozen=True)
class Row:
    """One line of the verdict: "ok", "warning", "failed" or "skipped"."""

    name: str
    verdict: str
    detail: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.verdict:8} {self.name:52} {' '.join(self.detail.split())}"


@dataclass
class Found:
    """What the parts have told so far.

    machine: what is installed, by name
    stock:   answers of stock vLLM, for the engine that evicts
    begun:   the row that is being looked at, if any
    is_done: whether the present part has told all
    """

    machine: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    stock: list[Any] | None = None
    begun: list[str] = field(default_factory=list)
    is_done: bool = False

    def hear(self, told: dict[str, Any]) -> Row | None:
        """Take over a line; return the row that it ends."""
        if "row" in told:
            row = Row(told["row"], told["verdict"], told["detail"], told["seconds"])
            self.rows.append(row)
            self.begun = [name for name in self.begun if name != row.name]
            return row
        self.machine |= told.get("machine", {})
        self.stock = told.get("stock", self.stock)
        self.begun += [told["begins"]] if "begins" in told else []
        self.is_done = self.is_done or "done" in told
        return None


def add_arguments(check: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser; ``args.run`` yields what it has to say."""
    check.description = (
        "Try every kernel, a stock engine and an evicting one on this machine, and say what works: one to two minutes "
        "with the tiny model on a quiet machine. Flags that are not listed here, such as --attention-backend, go to "
        f"vLLM's engines. On a CPU their cache takes {_CPU_GIB} GiB, unless {_CPU_SPACE} says otherwise. Exits with 1 "
        "if a row fails."
    )
    check.add_argument("--model", metavar="M", help="Model name or folder; a tiny one is built if none is given.")
    check.add_argument("--json", action="store_true", help="Print JSON, as a bug report wants it.")
    check.set_defaults(run=_check)


def _check(args: argparse.Namespace, engine_flags: list[str]) -> Iterator[str]:
    found = Found()
    bar = tqdm(unit="row", leave=False, disable=None)  # None: where stderr is no terminal
    with tempfile.TemporaryDirectory(prefix="kvevict-check-") as folder, bar:
        for part in _PARTS:
            known = {"model": args.model, "folder": folder, "flags": engine_flags, "stock": found.stock}
            for row in run_part(part, known, found, Path(folder)):
                bar.set_description_str(row.name[:40], refresh=False)
                bar.update()
                if not args.json:
                    bar.clear()
                    yield str(row)
    failed = [row.name for row in found.rows if row.verdict == "failed"]
    if args.json:
        yield json.dumps({"machine": found.machine, "rows": [asdict(row) for row in found.rows]}, indent=2)
    else:
        yield ", ".join(f"{name} {value}" for name, value in found.machine.items())
        yield f"{len(found.rows) - len(failed)} of {len(found.rows)} rows are well" + (
            f"; failed: {', '.join(failed)}" if failed else ""
        )
    if failed:
        raise SystemExit(1)


def run_part(part: str, known: dict[str, Any], found: Found, folder: Path) -> Iterator[Row]:
    """Run a part in a process of its own, and yield its rows as they come.

    A row in which the process dies, or does not end, has failed, as has a part that tells nothing.
    """
    reading, writing = os.pipe()
    log = folder / f"{part}.log"
    # the scheduler and the worker must be in the process that looks at them
    usual = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", _CPU_SPACE: _CPU_GIB}  # vLLM's default wants most of the memory
    environment = {**usual, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with log.open("wb") as output, os.fdopen(reading, "rb", buffering=0) as told:
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, part, json.dumps(known), str(writing)],
            pass_fds=[writing],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.close(writing)
        found.is_done, found.begun = False, []
        try:
            for line in _lines(told, time.monotonic() + _MOST_SECONDS):
                if (row := found.hear(json.loads(line))) is not None:
                    yield row
        finally:
            _end(process)
    if not found.is_done:
        name = found.begun[-1] if found.begun else f"the part {part!r}"
        row = Row(name, "failed", _why(process.returncode, log))
        found.rows.append(row)
        yield row


def _lines(told: FileIO, deadline: float) -> Iterator[bytes]:
    """Yield lines until the other side closes, or it is too late: all that came by then, but for a line begun."""
    begun = b""
    with selectors.DefaultSelector() as selector:
        selector.register(told, selectors.EVENT_READ)
        while selector.select(max(deadline - time.monotonic(), 0)):
            came = told.read(1 << 16)
            if not came:
                return
            *lines, begun = (begun + came).split(b"\n")
            yield from lines


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=3)  # it has told all
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _why(status: int, log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    ended = f"the process ended with {status}" if status != -signal.SIGKILL else f"no end after {_MOST_SECONDS} seconds"
    return f"{ended}; it said last: {' | '.join(line.strip() for line in lines)}"
