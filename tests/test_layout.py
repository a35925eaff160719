"""Rules about files: who may import vLLM, what a kernel comes with, how long a file gets, what no file may name."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path
from textwrap import dedent

import pytest

from tools import second_tier

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vllm_kvevict"
MODULES = sorted(PACKAGE.rglob("*.py"))
NO_KERNELS = (
    "__init__",
    "chunk_batch",
    "interface",
    "native",
    "operators",
    "paged",
    "rotary",
    "self_test",
    "optional_triton",
    "optional_xformers",
    "paged_tiles",
    "whitening",
    "window_batch",
)
KERNELS = [path.stem for path in MODULES if path.parent.name == "kernels" and path.stem not in NO_KERNELS]
# a ratchet: the most lines of any file, class and function today; lower a number when its holder becomes shorter
MOST_LINES = {"file": 398, "class": 354, "function": 73}
_LOW = ("foreign", "registry", "kernels", "cache", "policies", "options", "budgets", "eviction", "config")
_ENGINE = (*_LOW, "engine")
# room, or module without one -> those it may import; the package itself and its __main__ may import all
MAY_IMPORT = {
    **{room: _LOW[:floor] for floor, room in enumerate(_LOW)},
    "engine": _LOW,  # what the processes share
    "engine.scheduler": _ENGINE,
    "engine.worker": (*_ENGINE, "engine.scheduler"),  # a worker's cache specs name the scheduler's managers
    "engine.frontend": _ENGINE,
    "engine.offline": (*_ENGINE, "engine.frontend", "engine.worker"),
    "commands": (*_ENGINE, "engine.frontend", "engine.offline"),
}
# In pieces, so that this file does not name them either.
REGISTRY_HOSTS = [
    "pypi" + ".org",
    "pypi" + ".python.org",
    "python" + "hosted.org",
    "download" + ".pytorch.org",
    "anaconda" + ".org",
    "registry" + ".npmjs",
    "proxy" + ".golang",
    "ghcr" + ".io",
]
MACHINE_PATH = re.compile(r"(?<![\w./~:-])/(?:work|root|tmp|home)(?:/|\b)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_roots(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, also inside functions."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.append(node.module)
    return {name.split(".")[0] for name in names}


@pytest.fixture(scope="module")
def tracked_files() -> list[Path]:
    """Every text file that git tracks or would track."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [ROOT / name for name in names if name]
    return [file for file in files if file.is_file() and b"\0" not in file.read_bytes()]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_engine_folder_imports_vllm(path: Path) -> None:
    if PACKAGE / "engine" not in path.parents:
        assert "vllm" not in imported_roots(path)


def module_of(path: Path) -> str:
    """Return the dotted name of a module within the package, empty for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if ".".join(parts[:2]) in MAY_IMPORT else parts[0]


def ours_imported_by(path: Path) -> set[str]:
    """Our modules that a file imports anywhere, also inside functions."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    found = set()
    for node in nodes:
        package, _, module = (node.module or "").partition(".")
        if package == PACKAGE.name:
            names = [".".join(filter(None, (module, alias.name))) for alias in node.names]
            found |= {name if name in IN_PACKAGE else module for name in names}
    return found


IN_PACKAGE = {module_of(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_from_the_rooms_below_only(path: Path) -> None:
    room = room_of(module_of(path))
    if room not in ("", "__main__"):
        above = {other for other in map(room_of, ours_imported_by(path)) if other != room} - set(MAY_IMPORT[room])
        assert not above


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module_of(path): ours_imported_by(path) for path in MODULES}).prepare()  # raises CycleError


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_classes_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    lines = {"file": [len(text.splitlines())], "class": [0], "function": [0]}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            lines[kind].append((node.end_lineno or 0) - node.lineno + 1)
    assert {kind: max(lines[kind]) for kind in lines if max(lines[kind]) > MOST_LINES[kind]} == {}


def test_no_file_is_called_utils() -> None:
    assert not [name_of(path) for path in MODULES if path.stem in ("utils", "util", "helpers", "common")]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_a_test_and_a_benchmark_of_its_name(kernel: str) -> None:
    assert (ROOT / "tests" / "kernels" / f"test_{kernel}.py").is_file()
    assert (ROOT / "benchmarks" / "kernels" / f"bench_{kernel}.py").is_file()


def test_no_file_names_the_host_of_a_package_registry(tracked_files: list[Path]) -> None:
    found = [(name_of(path), host) for path in tracked_files for host in REGISTRY_HOSTS if host in path.read_text()]
    assert not found


def test_no_file_holds_a_path_of_somebodys_machine(tracked_files: list[Path]) -> None:
    found = [(name_of(path), match[0]) for path in tracked_files if (match := MACHINE_PATH.search(path.read_text()))]
    assert not found


@pytest.mark.parametrize("marker", ["more()", "more('')", "more(WHY)", "more_on_v2(reason='slow')", "more('a', 'b')"])
def test_a_test_of_the_second_tier_says_why(tmp_path: Path, marker: str) -> None:
    (tmp_path / "test_some.py").write_text(f"@pytest.mark.{marker}\ndef test_it(): ...\n")
    with pytest.raises(ValueError, match=r"test_some.py:1: expected a reason, one literal text, got pytest.mark"):
        second_tier.table(tmp_path)


def test_the_list_of_the_second_tier_names_tests_and_cases(tmp_path: Path) -> None:
    some = """
        CASES = [1, pytest.param(2, marks=pytest.mark.more("b"))]
        @pytest.mark.more_on_v2("a")
        def test_one(): ...
        @pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.more("b")), 2])
        def test_two(): ...
    """
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "test_some.py").write_text(dedent(some))
    guard = some.replace("        CASES", "        pytestmark = pytest.mark.on_v1\n        CASES", 1)
    (tmp_path / "engine" / "test_guard.py").write_text(dedent(guard))
    (tmp_path / "test_rare.py").write_text('pytestmark = pytest.mark.for_release("d")\n')
    (tmp_path / "test_whole.py").write_text('pytestmark = [pytest.mark.more("c")]\n')
    assert second_tier.table(tmp_path).splitlines()[2:] == [
        "| `engine/test_guard.py`, some cases, cases of `test_two` | never | `make test-more` | b |",
        "| `engine/test_guard.py`, `test_one` | `make test` | `make test-more` | a |",
        "| `engine/test_some.py`, some cases, cases of `test_two` | never | `make test-more` | b |",
        "| `engine/test_some.py`, `test_one` | `make test-release` | `make test-more` | a |",
        "| `test_rare.py` | `make test-release` | never | d |",
        "| `test_whole.py` | `make test-more` | never | c |",
    ]
