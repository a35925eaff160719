"""Rules about README.md and the pages of docs/: how long, where links lead, and that names are real."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.pages import COMMENT, DOCS, EXAMPLE, FENCE, PAGES, SPAN, blocks_of, code_of
from tests.test_layout import MAY_IMPORT
from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.commands.main import main
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.options.table import options_of_requests
from vllm_kvevict.policies import POLICIES

PACKAGE = ROOT / "vllm_kvevict"
MAX_README_WORDS = 1000  # three minutes
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)+\.(?:py|cpp|hpp|cu|cuh|md|json|toml|yaml|csv|png|svg|txt)")
NOT_OURS = ("v1/", ".cache/", "benchmarks/results/gpu_engine.csv")  # vLLM's, and those that commands make


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def rendered(text: str) -> str:
    """What a reader sees of Markdown: no comments, and of links their text."""
    return re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", COMMENT.sub("", text))


def num_words(text: str) -> int:
    """Words of Markdown as it is rendered, code included."""
    return sum(bool(re.search(r"\w", word)) for word in re.split(r"[\s|]+", rendered(text)))


def without_code(text: str) -> str:
    return SPAN.sub("", FENCE.sub("", COMMENT.sub("", text)))


def anchors_of(text: str) -> set[str]:
    """The anchors that headings get on GitHub."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", COMMENT.sub("", text)), re.MULTILINE)
    found: list[str] = []
    for heading in headings:
        slug = re.sub(r"[^\w\- ]", "", rendered(heading).lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def broken_links(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(without_code(text)):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = page.parent / target if target else page
        is_page = file.suffix == ".md" and file.is_file()
        headings = text if file == page else file.read_text() if is_page else ""
        if not file.exists() or (anchor and anchor not in anchors_of(headings)):
            found.append(link)
    return found


def test_the_readme_is_read_in_three_minutes() -> None:
    assert num_words((ROOT / "README.md").read_text()) <= MAX_README_WORDS


def test_words_are_those_that_a_reader_sees() -> None:
    text = "<!-- not\nthis --> One [two three](four/five.md), `six`\n\n| a | b-c |\n| --- | --- |\n```bash\nmake\n```\n"
    assert num_words(text) == 8  # the name of the block's language is one of them


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_link_is_broken(page: Path) -> None:
    assert not broken_links(page, page.read_text())


def test_a_broken_link_is_found() -> None:
    links = ["nowhere.md", "docs/gpu.md#nowhere", "#nowhere", "docs/gpu.md#how-to-run-it", "Makefile", "#some-heading"]
    text = "# Some heading\n" + "".join(f"[x]({link})" for link in links) + "`[x](code.md)`"
    assert broken_links(ROOT / "README.md", text) == links[:3]


def test_every_page_is_reached_from_the_readme() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        links = [link.partition("#")[0] for link in LINK.findall(without_code(page.read_text())) if "://" not in link]
        files = [(page.parent / link).resolve() for link in links if link.endswith(".md")]
        waiting += [file for file in files if file not in seen and file.is_file()]
    assert set(DOCS) <= seen


@pytest.mark.parametrize("registry", [POLICIES, ALLOCATORS], ids=["policies", "allocators"])
def test_the_page_of_policies_names_every_one(registry: type) -> None:
    text = (ROOT / "docs" / "policies.md").read_text()
    assert not [name for name in registry.names() if f"`{name}`" not in text]  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_quoted_files_exist(page: Path) -> None:
    spans = [span for span in code_of(page.read_text()) if PATH.fullmatch(span)]
    files = [span for span in spans if not span.startswith(NOT_OURS) and "NAME" not in span]
    folders = (ROOT, PACKAGE, ROOT / "tests", page.parent)
    assert not [file for file in files if not any((folder / file).is_file() for folder in folders)]


def test_the_page_of_architecture_names_every_room_from_the_lowest_to_the_highest() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.partition("\n## Rooms of the package\n")[2].partition("\n## ")[0]
    rooms = [row[3:].partition("`")[0] for row in section.splitlines() if row.startswith("| `")]
    named = [room.rstrip("/").removesuffix(".py").replace("/", ".") for room in rooms]
    assert sorted(named) == sorted(MAY_IMPORT)
    for place, room in enumerate(named):
        assert not set(MAY_IMPORT[room]) - set(named[:place])


def test_the_page_of_configuration_is_one_table_of_all_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])  # which takes the flags of the server
    ours = re.findall(r"--kv-[a-z-]+", capsys.readouterr().out)
    names = {*ours, *options_of_requests(EvictionConfig), *EvictionConfig.model_fields}
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert not [name for name in sorted(names) if not re.search(rf"`{name}\b", "\n".join(rows))]
    assert sum(set(row) <= set("|- ") for row in rows) == 1


def test_the_errors_that_operations_explains_are_those_of_the_package() -> None:
    """A row quotes a message with … for what differs; every part of it stands in a text of the package."""
    section = (ROOT / "docs" / "operations.md").read_text().partition("\n## Errors and their remedies\n")[2]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    quoted = [message for cell in cells for message in SPAN.findall(cell)]
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = "\0".join(node.value for node in nodes if isinstance(node.value, str))
    assert len(quoted) > 20
    assert not [message for message in quoted for part in message.split("…") if part.strip() not in texts]


def test_the_policy_on_the_page_is_the_one_of_the_example() -> None:
    (block,) = [block for block in blocks_of(ROOT / "docs" / "policies.md", "python") if "class FadingNorm" in block]
    lines = iter((EXAMPLE / "fading_norm.py").read_text().splitlines())
    assert all(line in lines for line in block.splitlines() if line.strip())  # each one behind the one before
