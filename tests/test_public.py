"""What code outside of this package may import: listed once, in docs/architecture.md."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_SECTION = (ROOT / "docs" / "architecture.md").read_text().partition("## Public surface")[2].partition("\n## ")[0]
_ROWS = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", _SECTION, re.M)
PUBLIC = {module: set(re.findall(r"`([^`]+)`", names)) for module, names in _ROWS}


def test_the_list_has_the_package_and_three_of_its_modules() -> None:
    assert set(PUBLIC) == {"vllm_kvevict", "vllm_kvevict.policies", "vllm_kvevict.budgets", "vllm_kvevict.config"}


@pytest.mark.parametrize("module", PUBLIC)
def test_a_public_module_exports_what_the_list_says(module: str) -> None:
    exported = importlib.import_module(module).__all__
    assert set(exported) == PUBLIC[module]


def code_for_others() -> dict[str, str]:
    """The examples, and the Python of all pages that is more than a fragment."""
    code = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "examples").rglob("*.py")}
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for place, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)):
            code[f"{page.relative_to(ROOT)}, block {place}"] = block
    return code


@pytest.mark.parametrize("where", code_for_others())
def test_code_for_others_imports_public_names_only(where: str) -> None:
    imports = [node for node in ast.walk(ast.parse(code_for_others()[where])) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if (node.module or "").split(".")[0] == "vllm_kvevict":
            assert {alias.name for alias in node.names} <= PUBLIC.get(node.module or "", set())


def test_the_third_party_example_is_among_that_code() -> None:
    assert any("vllm_kvevict.policies" in text for where, text in code_for_others().items() if "third_party" in where)
