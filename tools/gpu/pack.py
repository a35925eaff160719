"""Build what the GPU machine lacks: vLLM with its compiled extensions for one architecture, and a few wheels.

vLLM's extensions are built on libtorch's stable ABI, so that those of its release load with the older PyTorch of that
machine. Kept are all Python files, the extensions that an engine with a dense model loads, and the metadata.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from tools.gpu.fatbin import keep_architecture
from tools.gpu.runs import PACK, ROOT
from tools.newest_vllm import WHEELS
from vllm_kvevict import __version__

VLLM = "vllm==0.32.0"
REQUIREMENTS = Path(__file__).with_name("wheels.txt")
ARCHITECTURE = 90
MANYLINUX = (39, 38, 36, 35, 34, 31, 28, 27, 24, 17)  # minor versions of glibc 2; pip matches each exactly
TARGET = ("--only-binary=:all:", "--python-version=3.12", "--implementation=cp")
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in MANYLINUX), "manylinux2014_x86_64", "manylinux1_x86_64")
MAX_BYTES = 56 * 2**20  # of the pack; with the checkout beside it, less than 64 MiB travel
EXTENSIONS = frozenset(
    {
        "vllm/_C_stable_libtorch.abi3.so",
        "vllm/cumem_allocator.abi3.so",
        "vllm/spinloop.abi3.so",
        "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    }
)
METADATA = (".dist-info/METADATA", ".dist-info/RECORD", ".dist-info/entry_points.txt")
UNUSED_TABLES = "helion"  # in the names of tuning tables, some MiB, of kernels that no run takes


def build_pack(pack: Path = PACK) -> Path:
    """Download what .cache/wheels lacks and write ``pack``, a tar.xz file of one folder, ``site``; return it.

    Raises CalledProcessError if pip finds no wheel, RuntimeError if the pack gets too large to carry.
    """
    pack.parent.mkdir(parents=True, exist_ok=True)
    partial = pack.with_name(f"{pack.name}.partial")
    wheels = [_files_of(wheel, lambda name: True) for wheel in _machine_wheels()]
    with tarfile.open(partial, "w:xz", preset=6) as archive:
        for name, content in chain(_files_of(_vllm_wheel(), is_needed), *wheels, plugin_metadata()):
            entry = tarfile.TarInfo(f"site/{name}")  # of nobody, at no time: the same wheels make the same pack
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    if partial.stat().st_size > MAX_BYTES:
        raise RuntimeError(f"{partial} has {partial.stat().st_size} bytes, expected at most {MAX_BYTES}")
    return partial.rename(pack)


def is_needed(name: str) -> bool:
    """Whether a file of vLLM's wheel goes into the pack."""
    is_table = name.endswith(".json") and UNUSED_TABLES not in name
    return name in EXTENSIONS or is_table or name.endswith((".py", *METADATA))


def plugin_metadata() -> Iterator[tuple[str, bytes]]:
    """Yield the metadata by which vLLM finds this package's plugin in every process; its code is the checkout's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = f"{project['name'].replace('-', '_')}-{__version__}.dist-info"
    yield f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {__version__}\n".encode()
    groups = []
    for group, entries in project["entry-points"].items():
        groups.append("\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()), ""]))
    yield f"{folder}/entry_points.txt", "\n".join(groups).encode()


def _files_of(wheel: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith("/") or not is_wanted(name):
                continue
            content = archive.read(name)
            if name in EXTENSIONS:
                pruned = bytearray(content)
                kept, zeroed = keep_architecture(pruned, ARCHITECTURE)
                print(f"{name}: {kept / 2**20:.1f} MiB of GPU code kept, {zeroed / 2**20:.1f} dropped", flush=True)
                content = bytes(pruned)
            yield name, content


def _vllm_wheel() -> Path:
    (wheel,) = _download([VLLM], WHEELS)
    return wheel


def _machine_wheels() -> list[Path]:
    lines = [line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    return _download([line for line in lines if line], WHEELS / "gpu", *TARGET, *(f"--platform={p}" for p in PLATFORMS))


def _download(requirements: list[str], folder: Path, *options: str) -> list[Path]:
    """Return the wheel of each requirement, which pins a version, from ``folder``; fetch what is not there."""
    missing = [requirement for requirement in requirements if not _wheels_in(folder, requirement)]
    if missing:
        print(f"downloading {', '.join(missing)} ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        subprocess.run([*command, *options, *missing], check=True)
    return [_wheels_in(folder, requirement)[0] for requirement in requirements]


def _wheels_in(folder: Path, requirement: str) -> list[Path]:
    wanted = Requirement(requirement)
    found = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        if name == canonicalize_name(wanted.name) and version in wanted.specifier:
            found.append(wheel)
    return found
