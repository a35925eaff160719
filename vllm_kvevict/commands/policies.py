"""The command ``policies``: a table for the command line and for docs/policies.md, with nothing written by hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, Need

START = "<!-- policies: kvevict policies --write docs/policies.md -->"
END = "<!-- end of policies -->"
NOTHING = "\N{EN DASH}"
# Of which the table states the memory: a layer of Llama-3.1-8B.
SIZES = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128}
READS = ("keys, values", "last queries", "all queries")
COLUMNS = {
    "name": "name",
    "idea": "idea",
    "needs": "needs beside keys and values",
    "query_aware": "query-aware",
    "protected": "always stays",
    "memory": "bytes per token",
    "paper": "source",
    "options": "options (default)",
}
MEMORY_NOTE = (
    f"Bytes per token of the prompt, in a layer like Llama-3.1-8B's ({SIZES['num_heads']} heads, "
    f"{SIZES['num_kv_heads']} KV heads, head size {SIZES['head_size']}; its cache has 4,096): held at most while one "
    "layer is scored, plus, where a second number follows, held in every layer until the prompt ends."
)


def add_arguments(policies: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser; ``args.run`` yields what it has to say."""
    policies.description = "Print the policies: what they need, protect and hold in memory, their sources and options."
    form = policies.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="Print it in Markdown.")
    form.add_argument(
        "--write", metavar="FILE", type=Path, help="Put its short form between the markers in FILE, docs/policies.md."
    )
    policies.set_defaults(run=_policies)


def _policies(args: argparse.Namespace, others: list[str]) -> Iterator[str]:
    if others:
        raise ValueError(f"unrecognized arguments: {' '.join(others)}")
    if args.write is None:
        yield markdown_table() if args.markdown else text_table()
        return
    args.write.write_text(with_table(args.write.read_text(encoding="utf-8")), encoding="utf-8")
    yield f"wrote {args.write}"


def text_table() -> str:
    """Return the table of all policies, those of other packages included, as aligned text; a sentence about each that
    its package does not bring.
    """
    columns = [column for column in COLUMNS if column != "idea"]  # the one that makes lines long
    names, broken = _usable()
    rows = [[COLUMNS[column] for column in columns]]
    rows += [[row[column] for column in columns] for row in map(row_of, names)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", MEMORY_NOTE, *broken])


def markdown_table() -> str:
    """Return the same table in Markdown."""
    rows = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    names, broken = _usable()
    for row in map(row_of, names):
        rows.append([f"`{row['name']}`" if column == "name" else row[column] for column in COLUMNS])
    return "\n".join([*map(_markdown_row, rows), "", MEMORY_NOTE, *broken])


def short_table() -> str:
    """Return this package's own policies in Markdown; those that share idea and source share a row."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for name in _usable()[0]:
        cls, row = POLICIES.get(name), row_of(name)
        if cls.__module__.startswith("vllm_kvevict."):
            shared.setdefault((row["idea"], READS[_reads(cls())], row["paper"]), []).append(f"`{name}`")
    rows = [["name", "idea", "reads", "source"], ["---"] * 4]
    rows += [[", ".join(names), *cells] for cells, names in shared.items()]
    return "\n".join(map(_markdown_row, rows))


def with_table(document: str) -> str:
    """Return ``document`` with what stands between its two markers replaced by that table.

    Raises ValueError if the markers are not there, once each and in order.
    """
    return with_text_between(document, START, END, short_table())


def with_text_between(document: str, start: str, end: str, text: str) -> str:
    """Return ``document`` with what stands between two lines of it, ``start`` and ``end``, replaced by ``text``.

    Raises ValueError if they are not there, once each and in order.
    """
    before, found_start, rest = document.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end) or start in after or end in after:
        raise ValueError(f"expected a document that holds {start!r} and after it {end!r}, once each")
    return f"{before}{start}\n{text}\n{end}{after}"


def _usable() -> tuple[list[str], list[str]]:
    """Return the names of policies that can be had, and a sentence about each of the others."""
    names, broken = [], []
    for name in POLICIES.names():
        try:
            POLICIES.get(name)
            names.append(name)
        except ValueError as error:
            broken.append(str(error))
    return names, broken


def row_of(name: str) -> dict[str, str]:
    """Return the cells of one policy with its default options, by the keys of ``COLUMNS``."""
    cls = POLICIES.get(name)
    row = {"name": name, "idea": _idea(cls), "options": _options(cls), "paper": cls.paper or NOTHING}
    try:
        policy = cls()
    except (TypeError, ValueError):  # an option that must be given: what follows depends on it
        return dict.fromkeys(COLUMNS, NOTHING) | row
    memory = [policy.scratch_bytes(**SIZES), policy.state_bytes(**SIZES)]
    return row | {
        "needs": _listed([*_queries(policy), *sorted(need.name.lower().replace("_", " ") for need in policy.needs)]),
        "query_aware": "yes" if policy.query_aware else "no",
        "protected": _listed(
            f"{number} {which}" for number, which in ((policy.num_sink, "first"), (policy.num_recent, "last")) if number
        ),
        "memory": " + ".join(f"{number:,}" for number in memory[: 2 if memory[1] else 1]),
    }


def _reads(policy: EvictionPolicy) -> int:
    return 2 if Need.ALL_QUERIES in policy.needs else int(policy.query_aware)


def _idea(cls: type[EvictionPolicy]) -> str:
    """The first line of the policy's module, without its name and full stop."""
    first_line = (sys.modules[cls.__module__].__doc__ or NOTHING).strip().splitlines()[0]
    return first_line.partition(": ")[2].rstrip(".") or first_line.rstrip(".")


def _options(cls: Any) -> str:
    return _listed(f"{option.name} ({_shown(option)})" for option in fields(cls))


def _shown(option: Any) -> str:
    if option.default is not MISSING:
        return str(option.default)
    return "required" if option.default_factory is MISSING else str(option.default_factory())


def _queries(policy: EvictionPolicy) -> list[str]:
    window = policy.query_window
    return [f"last {window} queries" if window > 1 else "last query"] if window else []


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(texts) or NOTHING


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
