"""The Python files of a vLLM that is not imported: the installed one's, or those inside a wheel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

from tools.newest_vllm import ROOT, download


@dataclass(frozen=True)
class Source:
    """One module. file: what a person would open; package: what relative imports begin with."""

    file: str
    text: str
    package: str


Sources = dict[str, Source]  # by the name of the module


def our_sources(parent: Path = ROOT, package: str = "vllm_kvevict") -> Sources:
    """Return every module of our package, wherever it lies in it."""
    return _folder(parent, package)


def vllm_sources(wanted: str) -> Sources:
    """Return the modules of vLLM ``wanted``, of the installed one if that is it and else of its wheel.

    The wheel is downloaded once, into .cache/wheels. Raises tools.newest_vllm.NoWheelError if it cannot be.
    """
    if wanted == installed_vllm():
        origin = getattr(find_spec("vllm"), "origin", None)
        return _folder(Path(str(origin)).parents[1], "vllm")
    with ZipFile(download(wanted, seconds=500)) as archive:
        files = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
        return dict(_modules((name, archive.read(name)) for name in files))


def installed_vllm() -> str:
    """Return the version of the installed vLLM, without the name of its build."""
    return version("vllm").partition("+")[0]


def _folder(parent: Path, package: str) -> Sources:
    files = sorted((parent / package).rglob("*.py"))
    return dict(_modules((file.relative_to(parent).as_posix(), file.read_bytes()) for file in files))


def _modules(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Source]]:
    for file, text in files:
        parts = file.removesuffix(".py").split("/")
        package = parts[:-1]
        module = package if parts[-1] == "__init__" else parts
        yield ".".join(module), Source(file, text.decode(), ".".join(package))
