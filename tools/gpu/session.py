"""Carry out runs one after the other, each in a process of its own, and keep what has ended whatever happens next."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.gpu.results import RESULTS, Measured, Record, append
from tools.gpu.runs import ROOT, Run, Work

LOGS = "logs.tar.xz"
MACHINE_SECONDS = 60
PATIENCE_SECONDS = 5  # for the last words of a process past its limit
LEAST_SECONDS = 20  # a run that has less left is not started
SOURCES = ("vllm_kvevict/**/*.py", "tools/gpu/engine.py", "tools/gpu/model.py", "tools/gpu/runs.py")
# warnings.showwarning's line for both kinds that vLLM reports, behind the name of the process if there are several
SYNCED = re.compile(r"(\S+\.py:\d+): UserWarning: .*(?:synchronizing CUDA operation|Implicit GPU<->CPU sync)")
COMPILED = re.compile(r"during inference: (.+?)\. This causes a latency spike")


@dataclass(frozen=True)
class Session:
    """Where and how long runs go on.

    out:     folder of the results and of the logs, packed
    scratch: folder of the model, the caches of compilers and the logs
    seconds: from now on, for everything
    site:    folder with vLLM and what it needs; None where the environment has them
    command: that was given, for the records
    """

    out: Path
    scratch: Path
    seconds: float
    site: Path | None
    dry_run: bool
    command: str

    def carry_out(self, runs: Sequence[Run], work: Work) -> None:
        end = time.monotonic() + self.seconds
        self.out.mkdir(parents=True, exist_ok=True)
        self.scratch.mkdir(parents=True, exist_ok=True)
        machine = self._describe_machine()
        sources = digest_of_sources()
        for run in runs:
            limit = min(run.seconds, end - time.monotonic())
            print(f"== {run.name}, at most {max(limit, 0):.0f} s", flush=True)
            start = time.monotonic()
            status = "not started" if limit < LEAST_SECONDS else self._run(run, work, limit)
            log = self._log(run.name)
            result = self.scratch / f"{run.name}.json"
            lines = log.read_text(errors="replace").splitlines() if status != "not started" else []
            record = Record(
                run=run,
                status=status,
                seconds=round(time.monotonic() - start, 1),
                dry_run=self.dry_run,
                command=self.command,
                machine=machine,
                sources=sources,
                measured=Measured.parse(json.loads(result.read_text())) if status == "ended" else None,
                synced=synced_places(lines),
                compiled=compiled_kernels(lines),
            )
            append(self.out / RESULTS, record)
            self._pack_logs()
            print(f"   {status} after {record.seconds} s", flush=True)
            print("".join(f"   | {line[:300]}\n" for line in lines[-6:] if status != "ended"), end="", flush=True)

    def _describe_machine(self) -> dict[str, Any]:
        result = self.scratch / "machine.json"
        status = self._call("machine", MACHINE_SECONDS, {}, "tools.gpu.machine", str(result))
        self._pack_logs()
        if status != "ended":
            print(f"the machine could not be described: {status}; see machine.log", flush=True)
            return {}
        machine: dict[str, Any] = json.loads(result.read_text())
        print(f"machine: {machine}", flush=True)
        return machine

    def _run(self, run: Run, work: Work, limit: float) -> str:
        settings, result = self.scratch / f"{run.name}.settings.json", self.scratch / f"{run.name}.json"
        result.unlink(missing_ok=True)
        settings.write_text(json.dumps({"run": asdict(run), "work": asdict(work)}))
        model = self.scratch / f"model-{work.layers}x{work.hidden_size}"
        variables = environment_of(run)
        return self._call(run.name, limit, variables, "tools.gpu.engine", str(settings), str(result), str(model))

    def _call(self, name: str, limit: float, variables: dict[str, str], *module: str) -> str:
        """Run a module until it ends or ``limit`` seconds are over; return how that went. All its processes end."""
        environment = {**os.environ, **self._environment(), **variables}
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                status = "ended" if process.wait(limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "timed out"
                process.send_signal(signal.SIGABRT)  # Python's fault handler says where every thread is
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE_SECONDS)
            finally:
                _end_group(process)
        return status

    def _environment(self) -> dict[str, str]:
        paths = [str(path) for path in (self.site, ROOT) if path is not None]
        return {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
            "TRITON_CACHE_DIR": str(self.scratch / "triton"),
            "VLLM_CACHE_ROOT": str(self.scratch / "vllm"),
        }

    def _log(self, name: str) -> Path:
        return self.scratch / f"{name}.log"

    def _pack_logs(self) -> None:
        partial = self.scratch / LOGS
        with tarfile.open(partial, "w:xz", preset=1) as archive:
            for log in sorted(self.scratch.glob("*.log")):
                archive.add(log, log.name)
        (self.out / LOGS).write_bytes(partial.read_bytes())


def environment_of(run: Run) -> dict[str, str]:
    """Return the variables of a run's process: no network, this host only, and what the run asks for."""
    variables = {
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "NCCL_SOCKET_IFNAME": "lo",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the worker is asked who it is, by a function of ours
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; this one and the next are read on a CPU only
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(run.core_process)),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(run.runner == 2)),
    }
    if run.policy is None:
        variables["VLLM_PLUGINS"] = ""  # none is loaded
    if not run.graphs:
        variables["VLLM_GPU_SYNC_CHECK"] = "warn"  # takes time: the runs whose speed counts are those with graphs
    return variables


def synced_places(log: Iterable[str]) -> dict[str, int]:
    """Return where, and how often, vLLM saw the CPU wait for the GPU in a step: file:line -> times."""
    found = Counter(match[1] for line in log if (match := SYNCED.search(line)))
    return {re.sub(r".*/(?=vllm(_kvevict)?/)", "", place): times for place, times in found.most_common()}


def compiled_kernels(log: Iterable[str]) -> list[str]:
    """Return the kernels that vLLM saw being compiled after its warm-up."""
    return sorted({match[1] for line in log if (match := COMPILED.search(line))})


def digest_of_sources() -> str:
    """Return a digest of the files that decide what a run does."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in SOURCES for file in ROOT.glob(pattern)}):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def unpack(pack: Path, scratch: Path) -> Path:
    """Return the folder of vLLM and what it needs, from ``pack`` unless an earlier session has unpacked it."""
    site = scratch / "site"
    if not site.exists():
        partial = scratch / "partial"
        with tarfile.open(pack, "r:xz") as archive:
            archive.extractall(partial, filter="data")
        (partial / "site").rename(site)
    return site
