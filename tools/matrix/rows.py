"""The rows of matrix.csv."""

from __future__ import annotations

import csv
from pathlib import Path

CSV = Path(__file__).with_name("matrix.csv")
OK = "ok"
# questions, in the order in which they are asked: "ok", or why not; empty if one before them failed
ESSENTIAL = ("built", "stock", "starts", "as_stock", "oracle", "blocks")
POLICIES = ("compactor", "expected_attention", "criticalkv", "keydiff")
# effect:     by how much eviction changes logits
# difference: of logits to those of transformers over the kept tokens
# ended:      why the process died, if it did
FIELDS = (
    "family", "mechanism", "vllm_class", *ESSENTIAL, *POLICIES, "effect", "difference", "ended", "seconds", "versions",
)  # fmt: skip


def read_rows() -> dict[str, dict[str, str]]:
    """Return the rows by the names of their families."""
    if not CSV.exists():
        return {}
    with CSV.open(newline="") as file:
        return {row["family"]: row for row in csv.DictReader(file)}
