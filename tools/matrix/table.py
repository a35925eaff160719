"""The table of families in docs/compatibility.md, from matrix.csv.

python -m tools.matrix.table --write docs/compatibility.md
"""

from __future__ import annotations

import re
import sys
import textwrap

from tools.feature_table import print_or_write
from tools.matrix.families import FAMILIES
from tools.matrix.rows import ESSENTIAL, OK, POLICIES, read_rows
from vllm_kvevict.commands.policies import with_text_between

START = "<!-- families: python -m tools.matrix.table --write docs/compatibility.md -->"
END = "<!-- end of families -->"
_LAYER = re.compile(r"^of its layer \S+ ")
_REFUSED = "ValueError: --kv-eviction does not work with "
# question -> what it means that the answer is no
_FAILED = {
    "built": "transformers cannot build it",
    "stock": "vLLM does not serve it here",
    "starts": "does not start",
    "as_stock": "differs from vLLM without eviction",
    "oracle": "differs from transformers",
    "blocks": "keeps blocks",
}


def works(row: dict[str, str]) -> bool:
    """Whether nothing evicted equals stock vLLM, evicted equals transformers, and all blocks come back."""
    return all(row[question] == OK for question in ESSENTIAL) and not row["ended"]


def table() -> str:
    """Return the page's text."""
    rows = [*read_rows().values()]
    working = [row for row in rows if works(row)]
    classes = {row["vllm_class"] for row in working}
    versions = " or ".join(sorted({row["versions"] for row in rows}))
    due = len(FAMILIES) - len(rows)
    not_run = f"; {due} more have not been run yet" if due else ""
    summary = (
        f"{len(working)} of {len(rows)} families work, by {len(classes)} model classes of vLLM ({versions}){not_run}. "
        "Each was run as a random tiny model in float32 on CPU, none with real weights, none on a GPU. It works if "
        "nothing evicted equals vLLM token by token, logits behind an eviction by `snapkv` and `adakv` equal those of "
        "transformers over the kept tokens (32 steps, 1e-3), and all blocks come back."
    )
    lines = ["| family | attention | with eviction | largest difference of logits | policies |", "|" + " --- |" * 5]
    lines += [
        f"| {row['family']} | {row['mechanism']} | {_outcome(row)} | {_tested(row)} | {_policies(row)} |"
        for row in rows
    ]
    return "\n".join([textwrap.fill(summary, 120), "", *lines])


def _outcome(row: dict[str, str]) -> str:
    if works(row):
        return f"works, by `{row['vllm_class']}`"
    if row["starts"].startswith(_REFUSED):
        return f"refused: {row['starts'].removeprefix(_REFUSED).partition(';')[0]}"
    failed = [(question, row[question]) for question in ESSENTIAL if row[question] not in ("", OK)]
    if not failed:
        return _for_a_cell(row["ended"])
    question, reason = failed[0]
    return f"{_FAILED[question]}: {_for_a_cell(reason)}"


def _tested(row: dict[str, str]) -> str:
    return f"{row['difference']}; eviction changes them by {row['effect']}" if works(row) else "not compared"


def _policies(row: dict[str, str]) -> str:
    """Return which of the policies run that ask most of a model."""
    if not works(row):
        return ""
    refused: dict[str, list[str]] = {}
    for policy in POLICIES:
        if row[policy] != OK:
            # the same of every layer
            reason = _LAYER.sub("", row[policy]).partition(". Choose")[0]
            refused.setdefault(_for_a_cell(reason), []).append(f"`{policy}`")
    if not refused:
        return "all"
    return "all but " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in refused.items())


def _for_a_cell(reason: str) -> str:
    return textwrap.shorten(reason.replace("|", "/"), 160, placeholder=" ...")


def with_table(document: str) -> str:
    """Return ``document`` with what stands between its two markers replaced by the table.

    Raises ValueError if the markers are not there, once each and in order.
    """
    return with_text_between(document, START, END, table())


if __name__ == "__main__":
    sys.exit(print_or_write(__doc__, table, with_table))
