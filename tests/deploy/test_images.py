"""The Dockerfiles, as far as they can be read without Docker: lint, what they copy, whom they run as."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.specifiers import SpecifierSet

from vllm_kvevict import __version__

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "deploy").glob("Dockerfile.*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WHEEL = f"dist/vllm_kvevict-{__version__}-py3-none-manylinux_2_28_x86_64.whl"
for_each = pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)


def instructions(file: Path) -> list[tuple[str, str]]:
    """What a Dockerfile says: (instruction, the rest), with the defaults of its arguments."""
    parser = DockerfileParser(fileobj=BytesIO(file.read_bytes()))
    found, defaults = [], {}
    for line in parser.structure:
        text = line["value"]
        for name, value in defaults.items():
            text = text.replace(f"${{{name}}}", value)
        if line["instruction"] == "ARG":
            name, _, default = text.partition("=")
            defaults[name] = default
        found.append((line["instruction"], text))
    return found


def values(file: Path, instruction: str) -> list[str]:
    return [value for name, value in instructions(file) if name == instruction]


def is_sent(path: str) -> bool:
    """Whether Docker is given a file: of the lines of .dockerignore that match it, the last one counts."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and (fnmatch(path, pattern) or path.startswith(f"{pattern}/")):
            sent = line.startswith("!")
    return sent


@for_each
def test_the_linter_has_nothing_to_say(file: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@for_each
def test_all_that_is_copied_exists_and_is_sent(file: Path) -> None:
    sources = [source for value in values(file, "COPY") for source in value.split()[:-1]]
    assert "dist/vllm_kvevict-*.whl" in sources
    for source in sources:
        if source.endswith(".whl"):
            files = [WHEEL] if fnmatch(WHEEL, source) else []
        else:
            path = ROOT / source
            found = [path] if path.is_file() else path.rglob("pyproject.toml")
            files = [str(each.relative_to(ROOT)) for each in found]
        assert files and all(map(is_sent, files)), source


def test_nothing_else_is_sent() -> None:
    others = ["README.md", ".git/config", "vllm_kvevict/config.py", "tools/demo.py", "deploy/.env", "dist/x.tar.gz"]
    assert not [path for path in others if is_sent(path)]


@for_each
def test_the_server_runs_as_nobody_special_and_says_how_it_is(file: Path) -> None:
    *_, user = values(file, "USER")
    assert int(user) > 0 and f"--uid {user} " in " ".join(values(file, "RUN"))
    assert values(file, "EXPOSE") == ["8000"]
    assert "http://localhost:8000/health" in values(file, "HEALTHCHECK")[0]
    assert values(file, "ENTRYPOINT") == ['["vllm", "serve"]']
    assert instructions(file)[-1][0] == "ENTRYPOINT"  # the flags come behind it


@for_each
def test_the_build_fails_for_a_vllm_that_is_not_supported_and_asks_the_plugin_for_help(file: Path) -> None:
    installs, user, asks = [value for name, value in instructions(file) if name in ("RUN", "USER")][-3:]
    assert "--no-deps /wheels/*.whl" in installs and user.isdecimal()
    _, check, last = [command.strip() for command in asks.split("&&")]
    assert last == "kvevict check --help"
    python, *arguments = shlex.split(check)
    assert python == "python3" and "check_version()" in check
    assert subprocess.run([sys.executable, *arguments], check=False).returncode == 0


def test_the_images_have_a_vllm_and_a_python_that_are_supported() -> None:
    (cuda,) = values(ROOT / "deploy" / "Dockerfile.cuda", "FROM")
    image, _, tag = cuda.partition(":")
    (vllm,) = [line for line in PROJECT["dependencies"] if line.startswith("vllm")]
    assert image == "vllm/vllm-openai" and tag.removeprefix("v") in SpecifierSet(vllm.removeprefix("vllm"))
    (cpu,) = values(ROOT / "deploy" / "Dockerfile.cpu", "FROM")
    image, _, tag = cpu.partition(":")
    assert image == "python" and tag.partition("-")[0] in SpecifierSet(PROJECT["requires-python"])
