"""The table of features says V2 only of what a test runs on V2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.feature_table import table

FEATURE = "import pytest\n@pytest.mark.feature('cats')\n"
SKIPPED = FEATURE + "@pytest.mark.skipif(USES_V2_RUNNER, reason='the interpreter has no cats')\n"
TEST = "def test_cats(): ...\n"


@pytest.mark.parametrize(
    ("file", "text", "runners"),
    [
        ("engine/test_cats.py", FEATURE + TEST, "V1, V2"),
        ("engine/test_cats.py", SKIPPED + TEST, "V1; on V2 not here: the interpreter has no cats"),
        ("e2e/test_cats.py", FEATURE + TEST, "V1"),
        ("e2e/test_cats.py", FEATURE.replace("'cats'", "'cats', runners=('V1', 'V2')") + TEST, "V1, V2"),
    ],
)
def test_a_row_says_what_its_tests_run_on(tmp_path: Path, file: str, text: str, runners: str) -> None:
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(text)
    assert f"| cats | {runners} | `{file}` |" in table(tmp_path).splitlines()


def test_what_one_test_skips_on_v2_another_may_show(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    for name, text in (("test_a.py", SKIPPED), ("test_b.py", FEATURE)):
        (tmp_path / "engine" / name).write_text(text + TEST)
    assert "| cats | V1, V2 | `engine/test_a.py`, `engine/test_b.py` |" in table(tmp_path).splitlines()
