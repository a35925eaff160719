"""What ``kvevict check`` says when a part dies, hangs or fails."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from vllm_kvevict.commands import check
from vllm_kvevict.commands.check import Found, Row, run_part
from vllm_kvevict.commands.main import main

BEGINS = "import json, os, sys; told = os.fdopen(int(sys.argv[3]), 'w')\n"
TELL = "print(json.dumps({}), file=told, flush=True)\n"
ROW = {"row": "first", "verdict": "ok", "detail": "as it should", "seconds": 0.5}


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that runs in place of a part."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(check, "_MODULE", "part_of_a_check")
    return tmp_path / "part_of_a_check.py"


def rows_of(tmp_path: Path, **known: object) -> list[Row]:
    return [*run_part("stock", known, Found(), tmp_path)]


def test_rows_come_as_they_are_told(part: Path, tmp_path: Path) -> None:
    part.write_text(BEGINS + "".join(TELL.format(line) for line in ({"begins": "first"}, ROW, {"done": "stock"})))
    assert rows_of(tmp_path) == [Row("first", "ok", "as it should", 0.5)]


@pytest.mark.parametrize(("told", "name"), [([{"begins": "second"}], "second"), ([], "the part 'stock'")])
def test_a_row_in_which_the_process_dies_has_failed(part: Path, tmp_path: Path, told: list[object], name: str) -> None:
    lines = ({"begins": "first"}, ROW, *told)
    part.write_text(BEGINS + "".join(map(TELL.format, lines)) + "print('a last word', flush=True); os.abort()")
    first, last = rows_of(tmp_path)
    assert (first.name, last.name, last.verdict) == ("first", name, "failed")
    assert last.detail.startswith("the process ended with -6") and "a last word" in last.detail


@pytest.mark.parametrize("rest", ["", '{"row": "seco'], ids=["between lines", "in a line"])
def test_a_row_that_hangs_is_named_though_lines_came_at_once(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: str
) -> None:
    monkeypatch.setattr(check, "_MOST_SECONDS", 2)
    lines = "".join(json.dumps(line) + "\n" for line in ({"begins": "first"}, ROW, {"begins": "second"}))
    part.write_text(BEGINS + f"told.write({lines + rest!r}); told.flush()\nimport time; time.sleep(100)")
    first, last = rows_of(tmp_path)
    assert (first.name, first.verdict, last.name, last.verdict) == ("first", "ok", "second", "failed")
    assert last.detail.startswith("no end after 2 seconds")


def test_a_part_that_hangs_is_ended(part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it has started."""
    monkeypatch.setattr(check, "_MOST_SECONDS", 1)
    child = tmp_path / "child"
    start = f"import subprocess, time; open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '100']).pid))\n"
    part.write_text(BEGINS + TELL.format({"begins": "first"}) + start + "time.sleep(100)")
    (row,) = rows_of(tmp_path)
    assert (row.name, row.verdict) == ("first", "failed")
    assert row.detail.startswith("no end after 1 seconds")
    stat, deadline = Path(f"/proc/{child.read_text()}/stat"), time.monotonic() + 10  # it was killed, not waited for
    while lives(stat) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not lives(stat)


def lives(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = 0
    try:
        main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    return status, capsys.readouterr().out


@pytest.mark.parametrize("verdict", ["ok", "warning", "skipped", "failed"])
def test_the_status_says_whether_a_row_has_failed(part: Path, capsys: pytest.CaptureFixture[str], verdict: str) -> None:
    row = ROW | {"verdict": verdict}
    part.write_text(BEGINS + TELL.format({"machine": {"vllm": "9"}}) + TELL.format(row) + TELL.format({"done": 1}))
    status, table = run(["check"], capsys)
    assert status == (verdict == "failed")
    assert f"{verdict:8} first" in table and "vllm 9" in table
    assert ("failed: first" in table) == (verdict == "failed")
    status, text = run(["check", "--json"], capsys)
    found = json.loads(text)
    assert status == (verdict == "failed")
    assert found["machine"] == {"vllm": "9"} and [one["verdict"] for one in found["rows"]] == [verdict] * 3
