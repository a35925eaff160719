"""The table of what works with eviction on, from the markers of the tests: ``feature`` and ``refused``.

python -m tools.feature_table --write docs/compatibility.md
"""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvevict.commands.policies import with_text_between

ROOT = Path(__file__).resolve().parents[1]
START = "<!-- features: python -m tools.feature_table --write docs/compatibility.md -->"
END = "<!-- end of features -->"


@dataclass(frozen=True)
class Marker:
    """One ``pytest.mark.feature(...)`` or ``pytest.mark.refused(...)`` in a test file.

    runners:   model runners that the test runs on; tests of tests/engine run on both unless the marker says otherwise
    not_on_v2: why the test is skipped on V2, None if it is not
    """

    kind: str
    name: str
    file: Path
    runners: tuple[str, ...]
    not_on_v2: str | None = None


def markers(tests: Path = ROOT / "tests") -> list[Marker]:
    """Return the markers of all test files, in the order of the files."""
    return [marker for file in sorted(tests.rglob("test_*.py")) for marker in _markers_in(file)]


def _markers_in(file: Path) -> Iterator[Marker]:
    tree = ast.parse(file.read_text())
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    not_on_v2 = {decorator: _reason_not_on_v2(test) for test in tests for decorator in test.decorator_list}
    for kind, node in marker_calls(tree, "feature", "refused"):
        both = ("V1", "V2") if file.parent.name == "engine" else ("V1",)
        runners, reason = _keywords(node).get("runners", both), not_on_v2.get(node)
        if reason is not None:
            runners = tuple(runner for runner in runners if runner != "V2")
        yield Marker(kind, ast.literal_eval(node.args[0]), file, runners, reason)


def _reason_not_on_v2(test: ast.FunctionDef) -> str | None:
    """Return the reason of ``pytest.mark.skipif(USES_V2_RUNNER, reason=...)`` above a test, None without it."""
    for decorator in test.decorator_list:
        for _, call in marker_calls(decorator, "skipif"):
            if ast.unparse(call.args[0]) == "USES_V2_RUNNER":
                return str(_keywords(call)["reason"])
    return None


def _keywords(call: ast.Call) -> dict[str | None, Any]:
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def marker_calls(tree: ast.AST, *kinds: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield (kind, call) for every ``pytest.mark.KIND(...)`` inside ``tree``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr in kinds and ast.unparse(node.func.value) == "pytest.mark":
            yield node.func.attr, node


def table(tests: Path = ROOT / "tests") -> str:
    """Return the page's text: a row for every feature that works, and a sentence with all that is refused."""
    found = markers(tests)
    works: dict[str, list[Marker]] = {}
    for marker in found:
        if marker.kind == "feature":
            works.setdefault(marker.name, []).append(marker)
    rows = ["| works with eviction on | runners | shown by `tests/` |", "| --- | --- | --- |"]
    for name, shown_by in sorted(works.items(), key=lambda item: item[0].lower()):
        files = sorted({str(marker.file.relative_to(tests)) for marker in shown_by})
        rows.append(f"| {name} | {_runners(shown_by)} | {', '.join(f'`{file}`' for file in files)} |")
    refused = sorted({marker.name for marker in found if marker.kind == "refused"}, key=str.lower)
    sentence = f"Refused at start-up, by name and with the remedy: {', '.join(refused)}."
    return "\n".join([*rows, "", textwrap.fill(sentence, 120)])


def _runners(shown_by: list[Marker]) -> str:
    """Return the runners that a feature was shown on, and if V2 is not one of them, what keeps it from V2 here."""
    runners = sorted({runner for marker in shown_by for runner in marker.runners})
    reasons = sorted({marker.not_on_v2 for marker in shown_by if marker.not_on_v2 is not None})
    if "V2" in runners or not reasons:
        return ", ".join(runners)
    return f"{', '.join(runners)}; on V2 not here: {', '.join(reasons)}"


def with_table(document: str) -> str:
    """Return ``document`` with what stands between its two markers replaced by the table.

    Raises ValueError if the markers are not there, once each and in order.
    """
    return with_text_between(document, START, END, table())


def print_or_write(description: str | None, table: Callable[[], str], with_table: Callable[[str], str]) -> int:
    """The command line: print the table, or put it between the markers of a file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of FILE")
    file = parser.parse_args().write
    if file is None:
        print(table())
    else:
        file.write_text(with_table(file.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(print_or_write(__doc__, table, with_table))
