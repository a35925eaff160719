"""A GPU session keeps what has ended, whatever comes next, and ends what does not end by itself."""

from __future__ import annotations

import json
import tarfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.tools.test_gpu_compare import measured
from tools.gpu.__main__ import main
from tools.gpu.results import RESULTS, read
from tools.gpu.runs import DECODE, EVICTED, RUNS, TINY, Run, Work, on_cpu
from tools.gpu.session import LOGS, Session, compiled_kernels, digest_of_sources, environment_of, synced_places

SYNC_LOG = """\
(EngineCore pid=7) /a/vllm_kvevict/engine/worker/rows.py:12: UserWarning: called a synchronizing CUDA operation (...)
  table.item()
/scratch/site/vllm/v1/worker/a.py:3: UserWarning: Tensor.to: a copy ... Implicit GPU<->CPU sync detected
/a/vllm_kvevict/engine/worker/rows.py:12: UserWarning: called a synchronizing CUDA operation (...)
/a/vllm_kvevict/engine/worker/rows.py:90: UserWarning: something else"""
JIT_LOG = "WARNING Triton kernel JIT compilation during inference: fold. This causes a latency spike; consider ..."


class Scripted(Session):
    """A session whose engines end as ``statuses`` says, by the names of their runs."""

    statuses: dict[str, str] = {}  # noqa: RUF012

    def _describe_machine(self) -> dict[str, Any]:
        return {"gpu": "none"}

    def _run(self, run: Run, work: Work, limit: float) -> str:
        self._log(run.name).write_text(f"log of {run.name}\n{JIT_LOG}\n")
        (self.scratch / f"{run.name}.json").write_text(json.dumps(asdict(measured(run))))
        if self.statuses.get(run.name) == "interrupted":
            raise KeyboardInterrupt
        return self.statuses.get(run.name, "ended")


def session(folder: Path, kind: type[Session] = Session, seconds: float = 600.0) -> Session:
    (folder / "scratch").mkdir()
    return kind(folder / "out", folder / "scratch", seconds, None, True, "command")


def test_what_has_ended_is_there_when_the_session_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "statuses", {DECODE.name: "timed out", "stock_graphs": "interrupted"})
    with pytest.raises(KeyboardInterrupt):
        session(tmp_path, Scripted).carry_out(RUNS, TINY)
    records = read([tmp_path / "out" / RESULTS])
    ended = {name: record.status for name, record in records.items()}
    assert ended == {
        "stock_eager": "ended",
        "nothing_evicted": "ended",
        EVICTED.name: "ended",
        DECODE.name: "timed out",
    }
    assert records[EVICTED.name].measured == measured(EVICTED)
    assert records[DECODE.name].measured is None
    assert records[EVICTED.name].compiled == ["fold"]
    with tarfile.open(tmp_path / "out" / LOGS) as archive:
        assert archive.getnames() == sorted(f"{name}.log" for name in ended)


def test_what_time_does_not_allow_is_not_started(tmp_path: Path) -> None:
    session(tmp_path, Scripted, seconds=5.0).carry_out(RUNS[:2], TINY)
    records = read([tmp_path / "out" / RESULTS])
    assert [record.status for record in records.values()] == ["not started", "not started"]


@pytest.mark.parametrize(
    ("module", "status"),
    [(("json.tool", "--help"), "ended"), (("json.tool", "no such file"), "failed")],
    ids=["ended", "failed"],
)
def test_a_process_ends_as_its_exit_status_says(module: tuple[str, ...], status: str, tmp_path: Path) -> None:
    assert session(tmp_path)._call("name", 30.0, {}, *module) == status


def test_a_process_past_its_limit_says_where_it_was_and_is_ended(tmp_path: Path) -> None:
    begin = time.monotonic()
    assert session(tmp_path)._call("name", 1.0, {}, "http.server", "0", "--bind", "127.0.0.1") == "timed out"
    assert time.monotonic() - begin < 10
    assert "serve_forever" in (tmp_path / "scratch" / "name.log").read_text()


def test_waits_are_counted_by_place() -> None:
    expected = {"vllm_kvevict/engine/worker/rows.py:12": 2, "vllm/v1/worker/a.py:3": 1}
    assert synced_places(SYNC_LOG.splitlines()) == expected


def test_late_compilations_are_named_once() -> None:
    assert compiled_kernels([JIT_LOG, JIT_LOG, "nothing"]) == ["fold"]


def test_stock_vllm_loads_no_plugin_and_graphs_are_timed_without_checks() -> None:
    by_name = {run.name: environment_of(run) for run in RUNS}
    assert [name for name, variables in by_name.items() if "VLLM_PLUGINS" in variables] == [
        "stock_eager",
        "stock_graphs",
    ]
    checked = {name for name, variables in by_name.items() if "VLLM_GPU_SYNC_CHECK" in variables}
    assert checked == {run.name for run in RUNS if not run.graphs}
    assert by_name["evicted_v1"]["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert by_name["evicted_core_process"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"


def test_a_cpu_runs_the_same_list_eagerly_on_v1() -> None:
    runs = [on_cpu(run) for run in RUNS]
    assert {(run.graphs, run.attention, run.runner) for run in runs} == {(False, None, 1)}
    kept = ("name", "policy", "evicts", "during_decode", "core_process")
    for run, original in zip(runs, RUNS, strict=True):
        assert [getattr(run, field) for field in kept] == [getattr(original, field) for field in kept]


def test_the_digest_is_of_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.gpu.session.ROOT", tmp_path)
    source = tmp_path / "vllm_kvevict" / "engine" / "step.py"
    source.parent.mkdir(parents=True)
    source.write_text("a")
    before = digest_of_sources()
    (tmp_path / "vllm_kvevict" / "README.md").write_text("not run")
    assert digest_of_sources() == before
    source.write_text("b")
    assert digest_of_sources() != before


def test_an_unknown_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--out", str(tmp_path), "no_such_run"])
    assert "unknown run: no_such_run" in capsys.readouterr().err
