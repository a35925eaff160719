"""What the pages quote that takes a server, an engine's page or minutes: each once, at about its smallest size."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.report import read
from benchmarks.serving import bench_workloads
from tests.monitoring import program
from tools import dashboard, screenshots
from tools.gpu.__main__ import main as gpu
from tools.gpu.results import RESULTS
from tools.gpu.results import read as read_records

pytestmark = pytest.mark.for_release("each starts servers or engines; what they share is tested in `make test`")


def test_workloads(model: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = "--workloads memory --rounds 1 --scale 0.2 --budget 96"
    monkeypatch.setattr(sys, "argv", ["bench_workloads", "--model", str(model), *sizes.split()])
    bench_workloads.main()
    rows = {row["arm"]: row for row in read(results / "workloads.csv")}
    assert rows.keys() == {*bench_workloads.ARMS}
    assert float(rows["budget"]["evictions"]) > 0 == float(rows[bench_workloads.STOCK]["evictions"])
    assert all(float(row["tokens_per_second"]) > 0 for row in rows.values())


def test_dashboard(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program("prometheus")
    monkeypatch.setattr(dashboard, "SECONDS", 5)
    monkeypatch.setattr(dashboard, "IMAGE", tmp_path / "dashboard.png")
    monkeypatch.setattr(dashboard, "build_model", lambda name: model)
    monkeypatch.setattr(sys, "argv", ["dashboard"])
    dashboard.main()
    assert (tmp_path / "dashboard.png").stat().st_size > 20_000


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium on this machine")
def test_screenshots(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screenshots, "IMAGES", tmp_path)
    monkeypatch.setattr(screenshots, "build_model", lambda name: model)
    monkeypatch.setattr(sys, "argv", ["screenshots"])
    screenshots.main()
    assert {image.name for image in tmp_path.glob("*.png")} == {"inspector.png", "report.png"}
    assert all(image.stat().st_size > 40_000 for image in tmp_path.glob("*.png"))


def test_dry_run_of_a_gpu_session(tmp_path: Path) -> None:
    assert gpu(["run", "--dry-run", "--out", str(tmp_path / "out"), "stock_eager", "nothing_evicted"]) in (0, 1)
    records = read_records([tmp_path / "out" / RESULTS])
    assert {name: record.status for name, record in records.items()} == {
        "stock_eager": "ended",
        "nothing_evicted": "ended",
    }
