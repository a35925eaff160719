"""The table of policies: complete, in step with its page, and written by one command."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from vllm_kvevict.commands.main import main
from vllm_kvevict.commands.policies import END, NOTHING, START, row_of, short_table
from vllm_kvevict.policies import POLICIES, EvictionPolicy, ScoreInputs


def test_a_row_says_what_the_policy_says() -> None:
    assert row_of("snapkv") == {
        "name": "snapkv",
        "idea": "keep the tokens that the end of the prompt attends to",
        "options": "window (32), pool_kernel (7), pool (max), group (mean)",
        "needs": "last 32 queries",
        "query_aware": "yes",
        "protected": "32 last",
        "memory": "64",
        "paper": "SnapKV, arXiv:2404.14469",
    }


@pytest.mark.parametrize("name", POLICIES.names())
def test_every_row_is_complete(name: str) -> None:
    row = row_of(name)
    assert all(row.values()) and not any("|" in cell or "\n" in cell for cell in row.values())


def test_what_every_query_leaves_behind_is_stated_apart() -> None:
    policy = POLICIES.get("h2o")()
    numbers = policy.scratch_bytes(32, 8, 128), policy.state_bytes(32, 8, 128)
    assert row_of("h2o")["memory"] == "{} + {}".format(*numbers) and "all queries" in row_of("h2o")["needs"]


def test_a_policy_with_an_option_that_must_be_given_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Demanding(EvictionPolicy):
        file: str

        def score(self, inputs: ScoreInputs):  # type: ignore[no-untyped-def]
            raise NotImplementedError

        def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
            return 0

    monkeypatch.setitem(POLICIES._classes, "demanding", Demanding)
    row = row_of("demanding")
    assert row["options"] == "file (required)" and row["memory"] == row["needs"] == row["paper"] == NOTHING


def test_the_command_prints_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    main(["policies"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(POLICIES.names())]] == POLICIES.names()
    main(["policies", "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("`")[1] for line in lines[2 : 2 + len(POLICIES.names())]] == POLICIES.names()
    assert len({line.count("|") for line in lines[: 2 + len(POLICIES.names())]}) == 1


@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_a_package_that_is_broken_spoils_no_other_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: list[str]
) -> None:
    entry = EntryPoint("broken", "no_such_package_of_policies:Policy", POLICIES.entry_group)
    monkeypatch.setitem(POLICIES._entry_points, "broken", entry)
    main(["policies", *form])
    lines = capsys.readouterr().out.splitlines()
    assert all(any(name in line for line in lines) for name in POLICIES.names() if name != "broken")
    assert lines[-1].startswith("eviction policy 'broken' of another package cannot be used: ModuleNotFoundError")
    assert short_table()


def test_the_page_s_table_has_every_policy_of_this_package_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names = re.findall(r"`([^`]+)`", short_table())
    assert sorted(names) == POLICIES.names()
    stranger = type("Stranger", (POLICIES.get("knorm"),), {"__module__": __name__})
    monkeypatch.setitem(POLICIES._classes, "stranger", stranger)
    assert "stranger" in POLICIES.names() and "stranger" not in short_table()


def test_the_command_writes_the_page_s_table(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    main(["policies", "--write", str(file)])
    assert file.read_text() == f"before\n{START}\n{short_table()}\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["", START, f"{END}\n{START}", f"{START}\n{END}\n{START}\n{END}"])
def test_a_file_without_the_markers_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = tmp_path / "page.md"
    file.write_text(text)
    with pytest.raises(SystemExit):
        main(["policies", "--write", str(file)])
    assert file.read_text() == text
    error = capsys.readouterr().err
    assert error.startswith("kvevict policies: error: expected a document that holds")
    assert error.count("\n") == 1


@pytest.mark.parametrize("flags", [["--model", "m"], ["--write", "no_such_folder/x"], ["--markdown", "--write", "x"]])
def test_wrong_flags_are_one_sentence(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["policies", *flags])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("kvevict policies: error: ")
    assert error.count("\n") == 1
