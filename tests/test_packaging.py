"""The package as a user installs it: sdist and wheel, for an empty folder and environment, with or without compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from openai import OpenAI

from tools.release import MANYLINUX, build, wrong_in
from tools.server import Server
from vllm_kvevict import __version__

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.more("builds and installs the package twice; set-up installs it from the checkout")
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "csrc", "vllm_kvevict")
NOT_COPIED = shutil.ignore_patterns("*.so", "__pycache__")
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
ALONE = {**os.environ, "PYTHONPATH": ""}
SAY_WHERE = "import vllm_kvevict; print(vllm_kvevict.__file__)"
SAY_KERNELS = "from vllm_kvevict.kernels.native import library; print(library() is not None)"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist and the wheel, the wheel built from the sdist; `make release` gives its own."""
    if given := os.environ.get("KVEVICT_DIST"):
        return Path(given)
    checkout = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=NOT_COPIED)
        else:
            shutil.copy(source, checkout / name)
    build(checkout, checkout / "dist")
    return checkout / "dist"


@pytest.fixture(scope="module")
def wheel_names(dist: Path) -> list[str]:
    return zipfile.ZipFile(only(dist, "*.whl")).namelist()


def test_wheel_holds_every_module_of_the_package(wheel_names: list[str]) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_kvevict").rglob("*.py")}
    assert modules <= set(wheel_names)


def test_wheel_holds_the_license_and_nothing_beside_the_package(wheel_names: list[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vllm_kvevict"}
    assert not [name for name in wheel_names if name.endswith((".cpp", ".hpp", ".cu"))]


def test_wheel_names_its_plugin_and_the_vllm_it_supports(dist: Path) -> None:
    wheel = zipfile.ZipFile(only(dist, "*.whl"))
    info = next(name for name in wheel.namelist() if name.endswith("METADATA")).removesuffix("METADATA")
    metadata = wheel.read(f"{info}METADATA").decode()
    assert "[vllm.general_plugins]\nkvevict = vllm_kvevict:register" in wheel.read(f"{info}entry_points.txt").decode()
    assert "Requires-Dist: vllm<0.34,>=0.32" in metadata
    assert "License-Expression: Apache-2.0" in metadata


@NEEDS_COMPILER
def test_wheel_is_one_for_every_python_and_an_old_system(dist: Path, tmp_path: Path) -> None:
    faults = wrong_in(dist, __version__)
    assert [fault for fault in faults if shutil.which("nvcc") or "it lacks vllm_kvevict/_cuda.so" not in fault] == []
    found = zipfile.ZipFile(only(dist, "*.whl"))
    (text,) = [found.read(name).decode() for name in found.namelist() if name.endswith(".dist-info/WHEEL")]
    assert [line for line in text.splitlines() if line.startswith("Tag: ")] == [f"Tag: py3-none-{MANYLINUX}"]
    for name in [name for name in found.namelist() if name.endswith(".so")]:
        dynamic = subprocess.run(
            ["objdump", "-p", found.extract(name, tmp_path)], capture_output=True, text=True, check=True
        )
        versions = re.findall(r"GLIBC_(\d+)\.(\d+)", dynamic.stdout)
        assert max((int(major), int(minor)) for major, minor in versions) <= (2, 28)
        assert not re.search(r"R(UN)?PATH", dynamic.stdout)  # torch's runtimes, not those of the machine that built it


@pytest.fixture(scope="module")
def environment(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of a fresh environment with the wheel, beside the engine's packages; nothing of the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    run("venv", "--without-pip", str(folder))
    programs = folder / "bin"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "engine.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth files nobody reads
    arguments = ["--no-index", "--no-deps", "--ignore-installed", str(only(dist, "*.whl"))]
    run(
        "pip", "--quiet", "--python", str(programs / "python"), "install", *arguments, CC="/bin/false", CXX="/bin/false"
    )
    server = programs / "vllm"
    main = "from vllm.entrypoints.cli.main import main\nif __name__ == '__main__':\n    main()\n"
    server.write_text(f"#!{programs / 'python'}\n{main}")
    server.chmod(0o755)
    return programs


def test_an_environment_with_the_wheel_has_the_command(environment: Path) -> None:
    program = environment / "kvevict"
    done = subprocess.run([program, "policies"], env=ALONE, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "snapkv" in done.stdout, done.stderr
    wrong = subprocess.run([program, "polices"], env=ALONE, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith("kvevict: error: ")


def test_an_environment_with_the_wheel_serves_with_eviction(
    environment: Path, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(environment / "python"))
    say_where = [sys.executable, "-c", SAY_WHERE]
    where = subprocess.run(say_where, env=ALONE, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert environment.parent in Path(where.stdout.strip()).parents
    flags = ["--kv-eviction", "snapkv", "--kv-budget", "64", "--max-model-len", "1024", "--enforce-eager"]
    with Server(smollm2, tmp_path / "log", *flags, env={"PYTHONPATH": ""}) as server:
        in_use = mapped_by_group(server)
        client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none")
        answer = client.completions.create(model=str(smollm2), prompt="one two three " * 100, max_tokens=8)
        assert answer.usage is not None and answer.usage.completion_tokens > 0
        assert server.metrics()["kvevict:evictions_total"] == 1
    if shutil.which("c++"):
        assert environment.parent in in_use["_cpu.so"].parents
    assert Path(torch.__file__).parent in in_use["libgomp.so.1"].parents


def test_an_environment_without_the_wheel_again_has_nothing_of_it(environment: Path) -> None:
    (packages,) = environment.parent.glob("lib/python*/site-packages")
    (packages / "engine.pth").unlink()  # the engine's packages have the plugin of the checkout among them
    arguments = ["--python", str(environment / "python"), "uninstall", "--yes", "vllm-kvevict"]
    run("pip", "--quiet", *arguments, PYTHONPATH="")
    assert not [*packages.rglob("*kvevict*"), *environment.glob("kvevict*")]


@pytest.fixture(scope="module")
def from_wheel(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was empty, with the wheel installed in it."""
    folder = tmp_path_factory.mktemp("from_wheel")
    install(folder, only(dist, "*.whl"))
    return folder


def test_wheel_imports_from_an_empty_folder(from_wheel: Path) -> None:
    assert from_wheel in Path(python(SAY_WHERE, from_wheel)).parents


@NEEDS_COMPILER
def test_wheel_brings_the_compiled_kernels(from_wheel: Path) -> None:
    assert python(SAY_KERNELS, from_wheel) == "True"


def test_sdist_installs_without_a_compiler(dist: Path, tmp_path: Path) -> None:
    install(
        tmp_path, only(dist, "*.tar.gz"), "--no-build-isolation", CC="/bin/false", CXX="/bin/false", PATH="/nowhere"
    )
    assert tmp_path in Path(python(SAY_WHERE, tmp_path)).parents
    assert not [*tmp_path.rglob("*.so")]
    assert python(SAY_KERNELS, tmp_path) == "False"


def mapped_by_group(server: Server) -> dict[str, Path]:
    """Return the shared libraries that the processes of a server have mapped: those of ours, and OpenMP runtimes."""
    assert server.process is not None
    found: dict[str, Path] = {}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        for part in process.memory_maps():
            path = Path(part.path)
            if re.match(r"_c(pu|uda)\.so|lib(gomp|omp|iomp5)\b", path.name):
                assert found.setdefault(path.name, path) == path
    return found


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def install(target: Path, package: Path, *flags: str, **environment: str) -> None:
    arguments = ["--quiet", "--no-index", "--no-deps", "--no-cache-dir", "--target", str(target), *flags, str(package)]
    run("pip", "install", *arguments, **environment)


def python(code: str, path: Path) -> str:
    """Run ``code`` with the package in ``path`` and the other packages of this environment."""
    # -S: the finder of an editable install, a .pth file, would step in for a module that ``path`` lacks
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path), sysconfig.get_path("purelib")])},
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run(module: str, *arguments: str, cwd: Path | None = None, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
