"""The list of tests that only ``make test-more`` runs, and why, from the markers ``more``, ``more_on_v1``
and ``more_on_v2``.

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
RUNNERS = {"more": "both", "more_on_v1": "V1", "more_on_v2": "V2"}


def table(tests: Path = ROOT / "tests") -> str:
    """Return a row for every file and reason; raise ValueError if a marker gives none."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for file in sorted(tests.rglob("*.py")):
        for name, kind, reason in _markers_in(file):
            names = rows.setdefault((str(file.relative_to(tests)), kind, reason), [])
            names += [name] * (name not in names)
    lines = ["| only in `make test-more`, of `tests/` | runner | why |", "| --- | --- | --- |"]
    for (file_name, kind, reason), names in rows.items():
        what = ", ".join([f"`{file_name}`", *filter(None, names)])
        lines.append(f"| {what} | {RUNNERS[kind]} | {reason} |")
    return "\n".join(lines)


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
