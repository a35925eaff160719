"""What the command refuses before an engine starts: one sentence on stderr, status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_kvevict.commands.main import main

LAVA = ("--kv-eviction", "lava", "--kv-budget", "64")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "prompt.txt").write_text("Hello")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "tokens.json").write_text("[3, -4]")
    return tmp_path


@pytest.mark.parametrize(
    ("prompt", "flags", "message"),
    [
        (("--prompt-file", "prompt.txt"), (), "'policy' is missing. Give --kv-eviction POLICY and --kv-budget N"),
        (("--prompt-file", "prompt.txt"), ("--kv-eviction", "lava"), "'budget' is missing"),
        (
            ("--prompt-file", "prompt.txt"),
            ("--kv-eviction", "lavaa"),
            "unknown eviction policy 'lavaa'. Did you mean 'lava'?",
        ),
        (("--prompt-file", "prompt.txt"), (*LAVA, "--max-tokens", "0"), "expected a whole number of at least 1"),
        (("--prompt-file", "empty.txt"), LAVA, "expected a prompt, got the empty file"),
        (("--prompt-file", "missing.txt"), LAVA, "expected a UTF-8 text file"),
        (("--prompt-tokens", "tokens.json"), LAVA, "expected a list of token ids"),
        (("--prompt-tokens", "prompt.txt"), LAVA, "expected a JSON file of token ids"),
        ((), LAVA, "one of the arguments --prompt-file --prompt-tokens is required"),
        (
            ("--prompt-file", "prompt.txt"),
            (*LAVA, "--out", "missing/x.html"),
            "expected a file in a folder that exists",
        ),
    ],
)
def test_wrong_flags_are_one_sentence(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prompt: tuple[str, ...],
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", "--model", "m", "--out", "report.html", *prompt, *flags])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in error and error.startswith("kvevict inspect: error: ") and error.count("\n") == 1
