"""The report on the benchmarks: each has a section, which shows the latest rows of every machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import main, results_of, scripts
from benchmarks.timing import RESULTS

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(ROOT.glob("benchmarks/**/bench_*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_benchmark_has_a_section(script: Path) -> None:
    assert f"\n## {script.stem}\n" in (RESULTS / "README.md").read_text(), "run `python -m benchmarks.report`"


def test_every_file_of_results_is_some_script_s() -> None:
    of_scripts = {path for script in scripts() for path in results_of(script, RESULTS)}
    # of the studies, one row per answer; of the calibration, which is no benchmark
    others = {path for path in RESULTS.glob("*.csv") if path.stem.endswith("_prompts")}
    assert set(RESULTS.glob("*.csv")) - others - {RESULTS / "calibration_points.csv"} <= of_scripts


def test_a_section_shows_the_last_commit_s_rows_of_each_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the figures")
    old, new = "A,2,t,v,old,clean,uniform,99.00001", "A,2,t,v,new,dirty,{},{}"
    rows = ["machine,threads,torch,vllm,commit,tree,allocator,step_ms", "B,1,t,v,old,clean,uniform,7.00001", old]
    rows += [new.format("uniform", 30.00007), new.format("lava", 31)]
    (tmp_path / "decode.csv").write_text("\n".join(rows))
    timings = "native_median_ms,reference_median_ms\nA,new,0.5,0.25"
    (tmp_path / "move_tokens.csv").write_text(f"machine,commit,{timings}")
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path)])
    monkeypatch.setattr(report, "MOST_ROWS", 3)
    main()
    text = (tmp_path / "README.md").read_text()
    assert (
        "B, threads 1, torch t, vLLM v, commit old:\n\n| allocator | step_ms |\n| --- | --- |\n| uniform | 7 |" in text
    )
    assert "commit new:\n\n| allocator | step_ms |\n| --- | --- |\n| uniform | 30 |\n| lava | 31 |\n\n![decode]" in text
    assert "99" not in text
    assert "`python -m benchmarks.serving.bench_decode`" in text
    assert text.count("No rows yet.") == len(scripts()) - 2
    assert {path.name for path in tmp_path.glob("*.png")} == {"decode.png", "move_tokens.png"}
