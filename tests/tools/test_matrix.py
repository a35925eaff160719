"""The model matrix: its page says what its rows say, and its tiny models can be built."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from tools.matrix.families import FAMILIES, Family
from tools.matrix.rows import OK, POLICIES, read_rows
from tools.matrix.table import table, with_table, works

ROOT = Path(__file__).resolve().parents[2]
NUM_WORKING, NUM_CLASSES = 67, 46  # at least
BUILT = ("Llama", "Gemma 3")


def test_the_page_says_what_the_rows_say() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    assert with_table(page) == page


def test_rows_are_those_of_families_in_their_order() -> None:
    rows = read_rows()
    assert [*rows] == [family.name for family in FAMILIES if family.name in rows]


def test_most_families_work() -> None:
    working = [row for row in read_rows().values() if works(row)]
    assert len(working) >= NUM_WORKING
    assert len({row["vllm_class"] for row in working}) >= NUM_CLASSES
    assert all(float(row["difference"]) <= 1e-3 and float(row["effect"]) >= 0.05 for row in working)


def test_a_row_that_does_not_work_says_why() -> None:
    lines = table().splitlines()
    for row in read_rows().values():
        (line,) = [line for line in lines if line.startswith(f"| {row['family']} |")]
        assert line.count("|") == 6
        if works(row):
            assert f"works, by `{row['vllm_class']}`" in line
            assert all(row[policy] == OK or row[policy].split()[0] in line for policy in POLICIES)
        else:
            assert "works" not in line and len(line.split("|")[3].strip()) > 10


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            family,
            marks=() if family.name in BUILT else pytest.mark.for_release("other families are built in the same way"),
            id=family.name,
        )
        for family in FAMILIES
    ],
)
def test_a_family_can_be_built(family: Family, tmp_path: Path) -> None:
    family.build(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == family.kind
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 16 << 20
