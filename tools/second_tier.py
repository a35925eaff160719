"""The list of tests that ``make test`` leaves out on one runner or both, and why, from the markers ``more``,
``not_on_v1``, ``more_on_v2`` and ``for_release``.

python -m tools.second_tier --write CONTRIBUTING.md
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.feature_table import ROOT, marker_calls, print_or_write
from vllm_kvevict.commands.policies import with_text_between

START = "<!-- second tier: python -m tools.second_tier --write CONTRIBUTING.md -->"
END = "<!-- end of second tier -->"
LATER, RELEASE = "`make test-more`", "`make test-release`"
# marker -> when a test runs on V1 and on V2; tests that are not of tests/engine run on V1 only
RUNNERS = {
    "more": ("never", LATER),
    "not_on_v1": ("never", "`make test`"),
    "more_on_v2": (RELEASE, LATER),
    "for_release": (RELEASE, "never"),
}


def table(tests: Path = ROOT / "tests") -> str:
    """Return a row for every file and reason; raise ValueError if a marker gives none."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for file in sorted(tests.rglob("*.py")):
        for name, kind, reason in _markers_in(file):
            names = rows.setdefault((str(file.relative_to(tests)), kind, reason), [])
            names += [name] * (name not in names)
    lines = ["| of `tests/` | on V1 | on V2 | why |", "| --- | --- | --- | --- |"]
    for (file_name, kind, reason), names in rows.items():
        what = ", ".join([f"`{file_name}`", *filter(None, names)])
        is_once = kind == "more" and not file_name.startswith("engine/")
        runs_on_v1, on_v2 = (LATER, "never") if is_once else RUNNERS[kind]
        if kind == "more_on_v2" and _is_on_v1(tests / file_name):
            runs_on_v1 = "`make test`"
        lines.append(f"| {what} | {runs_on_v1} | {on_v2} | {reason} |")
    return "\n".join(lines)


def _is_on_v1(file: Path) -> bool:
    """Whether all tests of a file have the marker ``on_v1``."""
    body = ast.parse(file.read_text()).body
    assigned = [node for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"]
    return any("mark.on_v1" in ast.unparse(node.value) for node in assigned)


def _markers_in(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (test, kind, reason); the test is "" for a whole file."""
    for name, node in _named_parts(ast.parse(file.read_text()).body):
        for kind, call in marker_calls(node, *RUNNERS):
            yield name, kind, _reason(file, call)


def _named_parts(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            yield from _named_parts(statement.body)
            yield from ((f"`{statement.name}`", decorator) for decorator in statement.decorator_list)
        elif isinstance(statement, ast.FunctionDef):
            for decorator in statement.decorator_list:
                is_marker = isinstance(decorator, ast.Call) and ast.unparse(decorator.func).split(".")[-1] in RUNNERS
                yield f"{'' if is_marker else 'cases of '}`{statement.name}`", decorator
        else:
            is_whole_file = isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "pytestmark"
            yield "" if is_whole_file else "some cases", statement


def _reason(file: Path, call: ast.Call) -> str:
    is_text = len(call.args) == 1 and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    reason = str(ast.literal_eval(call.args[0])).strip() if is_text and not call.keywords else ""
    if not reason:
        where = f"{file.name}:{call.lineno}"
        raise ValueError(f"{where}: expected a reason, one literal text, got {ast.unparse(call)}")
    return reason


def with_table(document: str) -> str:
    """Return ``document`` with what stands between its two markers replaced by the table.

    Raises ValueError if the markers are not there, once each and in order.
    """
    return with_text_between(document, START, END, table())


if __name__ == "__main__":
    sys.exit(print_or_write(__doc__, table, with_table))
