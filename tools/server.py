"""Put up a real ``vllm serve`` for a while: free port, own process group, wait for health, metrics, certain stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

HOST = "127.0.0.1"
POLL_SECONDS = 0.5
REPORT_EVERY_SECONDS = 10.0
LOG_TAIL_LINES = 40


class ServerError(RuntimeError):
    """The server ended, or was not healthy in time; the message holds the end of its log."""


class Server:
    """``with Server(model, log_path, "--enforce-eager") as server:`` serves ``model`` inside the block.

    model:    local folder or model name, as ``vllm serve`` takes it
    log_path: file that receives the server's output; overwritten
    args:     further arguments of ``vllm serve``
    env:      environment variables; they win over this process's own, and those over ``cpu_environment()``
    deadline_seconds: how long to wait for health
    report:   called with the seconds waited, at the start of the wait and every ten seconds

    Raises ServerError if the server ends or stays unhealthy past the deadline; its processes are gone by then.
    """

    def __init__(
        self,
        model: str | Path,
        log_path: Path,
        *args: str,
        env: Mapping[str, str] | None = None,
        deadline_seconds: float = 300.0,
        report: Callable[[float], None] | None = None,
    ) -> None:
        self.model = str(model)
        self.log_path = log_path
        self.args: Sequence[str] = args
        self.env = {**cpu_environment(), **os.environ, **(env or {})}
        self.deadline_seconds = deadline_seconds
        self.report = report or (lambda seconds: None)
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server in a process group of its own and return once it is healthy."""
        vllm = Path(sys.executable).with_name("vllm")
        command = [str(vllm), "serve", self.model, "--host", HOST, "--port", str(self.port), *self.args]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def stop(self, patience_seconds: float = 20.0) -> None:
        """End every process of the group: ask the first one, which ends its own children, and kill what is left."""
        if self.process is None:
            return
        self.process.terminate()
        end = time.monotonic() + patience_seconds
        while time.monotonic() < end and (self.process.poll() is None or _group_lives(self.process.pid)):
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.base_url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def samples(self) -> list[Sample]:
        """Every sample of ``/metrics``, with its labels."""
        with urllib.request.urlopen(f"{self.base_url}/metrics", timeout=10) as response:
            text = response.read().decode()
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def metrics(self) -> dict[str, float]:
        """``/metrics`` as sample name -> value, summed over the labels; histogram buckets are left out."""
        totals: dict[str, float] = defaultdict(float)
        for sample in self.samples():
            if not sample.name.endswith("_bucket"):
                totals[sample.name] += sample.value
        return dict(totals)

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _wait_until_healthy(self) -> None:
        start = time.monotonic()
        next_report = 0.0
        while not self.is_healthy():
            waited = time.monotonic() - start
            if self.process is None or self.process.poll() is not None:
                raise ServerError(f"the server ended before it was healthy; end of {self.log_path}:\n{self.log_tail()}")
            if waited > self.deadline_seconds:
                raise ServerError(f"not healthy after {waited:.0f} s; end of {self.log_path}:\n{self.log_tail()}")
            if waited >= next_report:
                self.report(waited)
                next_report += REPORT_EVERY_SECONDS
            time.sleep(POLL_SECONDS)


def cpu_environment() -> dict[str, str]:
    """Variables for vLLM on a machine without a GPU: no network, cores named (``auto`` would leave one idle)."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)) if len(cores) > 1 else "nobind",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _group_lives(group: int) -> bool:
    """Whether a process of ``group`` still runs. A zombie does not: in a container nobody may ever collect it."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, group_of_process = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # ended while we looked
            continue
        if int(group_of_process) == group and state not in "ZX":
            return True
    return False
