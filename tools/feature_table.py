"""The README's table of what works with eviction on, from the markers of the tests: ``feature`` and ``refused``.

python -m tools.feature_table --write README.md
"""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_kvevict.policies.table import with_text_between

ROOT = Path(__file__).resolve().parents[1]
START = "<!-- features: python -m tools.feature_table --write README.md -->"
END = "<!-- end of features -->"


@dataclass(frozen=True)
class Marker:
    """One ``pytest.mark.feature(...)`` or ``pytest.mark.refused(...)`` in a test file.

    runners: model runners that the test runs on; tests of tests/engine run on both unless the marker says otherwise
    """

    kind: str
    name: str
    file: Path
    runners: tuple[str, ...]


def markers(tests: Path = ROOT / "tests") -> list[Marker]:
    """Return the markers of all test files, in the order of the files."""
    return [marker for file in sorted(tests.rglob("test_*.py")) for marker in _markers_in(file)]


def _markers_in(file: Path) -> Iterator[Marker]:
    for kind, node in marker_calls(ast.parse(file.read_text()), "feature", "refused"):
        runners = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}.get("runners")
        both = ("V1", "V2") if file.parent.name == "engine" else ("V1",)
        yield Marker(kind, ast.literal_eval(node.args[0]), file, runners or both)


def marker_calls(tree: ast.AST, *kinds: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield (kind, call) for every ``pytest.mark.KIND(...)`` inside ``tree``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr in kinds and ast.unparse(node.func.value) == "pytest.mark":
            yield node.func.attr, node


def table() -> str:
    """Return the README's text: a row for every feature that works, and a sentence with all that is refused."""
    found = markers()
    works: dict[str, list[Marker]] = {}
    for marker in found:
        if marker.kind == "feature":
            works.setdefault(marker.name, []).append(marker)
    rows = ["| works with eviction on | runners | shown by `tests/` |", "| --- | --- | --- |"]
    for name, shown_by in sorted(works.items(), key=lambda item: item[0].lower()):
        runners = sorted({runner for marker in shown_by for runner in marker.runners})
        files = sorted({str(marker.file.relative_to(ROOT / "tests")) for marker in shown_by})
        rows.append(f"| {name} | {', '.join(runners)} | {', '.join(f'`{file}`' for file in files)} |")
    refused = sorted({marker.name for marker in found if marker.kind == "refused"}, key=str.lower)
    sentence = f"Refused at start-up, by name and with the remedy: {', '.join(refused)}."
    return "\n".join([*rows, "", textwrap.fill(sentence, 120)])


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
