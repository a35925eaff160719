"""Reads the commands that the pages quote: each by its own program, which is stopped once it has read its arguments."""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from setuptools.dist import Distribution

from tests.conftest import ROOT
from vllm_kvevict import __version__
from vllm_kvevict.commands import check
from vllm_kvevict.commands.main import main

MODELS = ("MODEL", "meta-llama/Llama-3.1-8B-Instruct")  # the reader's, and one that only a network has


class Read(Exception):
    """The program has read its arguments and found nothing wrong."""


def read(command: Sequence[str], patch: pytest.MonkeyPatch, model: Path) -> None:
    """Let a program read its arguments. Raises what it does about wrong ones, most often SystemExit.

    model: in the place of MODELS; ``...`` is left out
    """
    program, *words = (str(model) if word in MODELS else word for word in command if word != "...")
    if program in ("kvevict", "vllm") and len(words) == 1:
        words.append("--help")  # the name of a command, in a sentence: there is one
    with patch.context() as here, suppress(Read):
        try:
            READERS.get(program, _read_files)(words, here)
        except SystemExit as end:
            if end.code:  # 0 is that of --help
                raise


def stop(*args: Any, **kwargs: Any) -> NoReturn:
    raise Read


def run_module(module: str, words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """Run ``python -m MODULE WORDS`` in this process."""
    patch.setattr(sys, "argv", [module, *words])
    runpy.run_module(module, run_name="__main__")


def _read_kvevict(words: list[str], patch: pytest.MonkeyPatch) -> None:
    from vllm import LLM

    patch.setattr(check, "run_part", stop)
    patch.setattr(LLM, "from_engine_args", stop)  # inspect and calibrate: vLLM has read the flags that are not ours
    main(words)


def _read_vllm(words: list[str], patch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli import main as cli
    from vllm.entrypoints.cli.serve import ServeSubcommand

    def configure(args: argparse.Namespace) -> None:
        args.model = args.model_tag
        AsyncEngineArgs.from_cli_args(args)  # which reads our configuration, too

    patch.setattr(ServeSubcommand, "cmd", staticmethod(configure))
    patch.setattr(sys, "argv", ["vllm", *words])
    cli.main()


def _read_python(words: list[str], patch: pytest.MonkeyPatch) -> None:
    if words[0] == "setup.py":
        patch.chdir(ROOT)
        patch.setattr(Distribution, "run_commands", stop)
        patch.setattr(sys, "argv", words)
        runpy.run_path("setup.py")
    elif words[1] == "pytest":
        _read_pytest(words[2:])
    else:
        parse_args = argparse.ArgumentParser.parse_args

        def parse_and_stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
            self.allow_abbrev = False
            parse_args(self, *args, **kwargs)
            raise Read

        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        run_module(words[1], words[2:], patch)
        raise AssertionError(f"{words[1]} read no arguments, and ran")


def _read_pytest(words: list[str]) -> None:
    from _pytest.config import get_config

    _read_files(get_config()._parser.parse(words).file_or_dir)


def _read_make(words: list[str], patch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, is_variable, value in (word.partition("=") for word in words):
        assert not is_variable or re.search(rf"^#   {name} ", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if name == "PYTEST_ARGS":
            _read_pytest(shlex.split(value))


def _read_pip(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """By a parser of our own: --group needs a pip that is newer than the one here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["install", "uninstall"])
    parser.add_argument("target", nargs="?")
    parser.add_argument("--group", choices=project["dependency-groups"])
    parser.add_argument("--no-deps", action="store_true")
    parser.add_argument("-e", "--editable")
    args = parser.parse_intermixed_args(words)
    if args.command == "uninstall" or (args.target or "").endswith(".whl"):
        assert args.target in ("vllm-kvevict", f"vllm_kvevict-{__version__}-py3-none-manylinux_2_28_x86_64.whl")
        return
    folder, _, extra = (args.editable or args.target or ".").rstrip("]").partition("[")
    assert (ROOT / folder / "pyproject.toml").is_file()
    assert not extra or extra in project["project"]["optional-dependencies"]


def _read_files(words: Sequence[str], patch: pytest.MonkeyPatch | None = None) -> None:
    """Of other programs: the files that they name, but for those that commands make."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    names = [word.replace("$VLLM", str(Path(spec.origin).parent)) for word in words]
    files = [name for name in names if "/" in name and not name.startswith(".cache/")]
    assert not [file for file in files if not (ROOT / file).exists()]


READERS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "kvevict": _read_kvevict,
    "make": _read_make,
    "pip": _read_pip,
    "python": _read_python,
    "vllm": _read_vllm,
}
