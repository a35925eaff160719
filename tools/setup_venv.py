"""Create or bring up to date the checkout's ``.venv``: a CPU vLLM, the test tools and this package, editable.

Standard library only, and idempotent: every step keeps a hash of what it was made from, so that a second run does
nothing and a changed version reinstalls that step and the ones after it. Versions live in ``pyproject.toml``.

TORCH_INDEX, an environment variable, names an extra package index that has PyTorch's CPU builds. Without it pip asks
the index it is configured for. ``--engine`` stops behind the CPU vLLM: an image needs no more (deploy/Dockerfile.cpu).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "kvevict-setup.json"
LOG = VENV / "kvevict-setup.log"
MINIMUM_PYTHON = (3, 11)
TORCH_INDEX = os.environ.get("TORCH_INDEX", "")
# Builds of these on the usual index do not match the CPU torch and break its import; text models need none of them.
LEFT_OUT = frozenset({"torch", "torchaudio", "torchcodec", "torchvision"})
ENGINE_FLAG = "--engine"
ENGINE_REQUIREMENTS_FLAG = "--engine-requirements"

GROUPS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
TORCH, ENGINE = GROUPS["engine-cpu"]
ENGINE_NAME = ENGINE.partition("==")[0]


class SetupError(Exception):
    """A step failed; the message says which command and shows the end of its output."""


@dataclass(frozen=True)
class Step:
    """One thing to install. It runs again when ``inputs``, or those of a step before it, have changed."""

    title: str
    inputs: str
    run: Callable[[], None]


def engine_steps() -> list[Step]:
    """Return those that end with a CPU vLLM."""
    alias = ROOT / "packaging" / "vllm-alias"
    return [
        Step("virtual environment", sys.version, create_venv),
        Step(TORCH, TORCH + TORCH_INDEX, lambda: pip_install(TORCH)),
        Step(ENGINE, ENGINE, lambda: pip_install("--no-deps", ENGINE)),
        Step(f"what {ENGINE_NAME} requires", "", lambda: pip_install(TORCH, *engine_requirements())),
        Step(
            "metadata of the name vllm",
            _hash_of([alias / "pyproject.toml"]),
            lambda: pip_install("--no-deps", "--no-build-isolation", str(alias)),
        ),
    ]


def steps() -> list[Step]:
    return [
        *engine_steps(),
        Step(
            "tools for tests and pages",
            str(GROUPS["test"] + GROUPS["docs"]),
            lambda: pip_install(TORCH, *GROUPS["test"], *GROUPS["docs"]),
        ),
        Step(
            "test models and kvpress",
            str(GROUPS["test-no-deps"]),
            lambda: pip_install("--no-deps", *GROUPS["test-no-deps"]),
        ),
        Step(
            "this package, editable",
            _hash_of([ROOT / "pyproject.toml", ROOT / "setup.py", *(ROOT / "csrc").rglob("*")]),
            lambda: pip_install("--no-deps", "--no-build-isolation", "--editable", str(ROOT)),
        ),
    ]


def set_up(todo: list[Step]) -> None:
    """Run the steps whose inputs changed. Raises SetupError at the first that fails."""
    done = _read_stamp()
    wanted: list[str] = []
    for number, step in enumerate(todo, start=1):
        wanted.append(hashlib.sha256(step.inputs.encode()).hexdigest())
        if done[:number] == wanted:
            continue
        print(f"set-up {number}/{len(todo)}: {step.title} ...", end="", flush=True)
        start = time.monotonic()
        step.run()
        print(f" {time.monotonic() - start:.0f} s", flush=True)
        STAMP.write_text(json.dumps(wanted))
    print(f"set-up: {VENV.name} is ready", flush=True)


def create_venv() -> None:
    if not PYTHON.exists():
        _call([sys.executable, "-m", "venv", str(VENV)])


def pip_install(*arguments: str) -> None:
    """Install into the environment, quietly: pip's output goes to the log and is shown only if it fails."""
    quiet = ["--quiet", "--no-input", "--progress-bar=off", "--disable-pip-version-check", "--no-warn-script-location"]
    index = ["--extra-index-url", TORCH_INDEX] if TORCH_INDEX else []
    _call([str(PYTHON), "-m", "pip", "install", *quiet, *index, *arguments])


def engine_requirements() -> list[str]:
    """The engine's own requirements, asked for in the environment, whose metadata and markers they are."""
    return _call([str(PYTHON), str(Path(__file__).resolve()), ENGINE_REQUIREMENTS_FLAG]).split("\n")


def _engine_requirements_here() -> Iterable[str]:
    from pip._vendor.packaging.requirements import Requirement

    for line in importlib.metadata.requires(ENGINE_NAME) or []:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in LEFT_OUT:
            requirement.marker = None
            yield str(requirement)


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    output = f"$ {' '.join(command)}\n{done.stdout}{done.stderr}"
    if VENV.is_dir():
        with LOG.open("a") as log:
            log.write(output)
    if done.returncode != 0:
        raise SetupError(f"exit status {done.returncode}:\n{output[:200]}\n...\n{output[-4000:]}")
    return done.stdout.strip()


def _hash_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _read_stamp() -> list[str]:
    try:
        return list(json.loads(STAMP.read_text()))
    except (OSError, ValueError):
        return []


def main(arguments: list[str]) -> int:
    if sys.version_info < MINIMUM_PYTHON:
        print(f"python: expected 3.11 or newer, got {sys.version.split()[0]}. Run `make PYTHON=python3.11`.")
        return 1
    if arguments == [ENGINE_REQUIREMENTS_FLAG]:
        print("\n".join(_engine_requirements_here()))
        return 0
    try:
        set_up(engine_steps() if arguments == [ENGINE_FLAG] else steps())
    except SetupError as error:
        print(f"\nset-up failed, {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
