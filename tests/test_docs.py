"""Rules about README.md and the pages of docs/: how long, where links lead, and that commands and names are real."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.pages import COMMENT, DOCS, EXAMPLE, FENCE, PAGES, SPAN, blocks_of, code_of, commands_of
from tests.test_layout import MAY_IMPORT
from tools.picture import PICTURE, picture
from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.commands.main import main
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.options.table import options_of_requests
from vllm_kvevict.policies import POLICIES

PACKAGE = ROOT / "vllm_kvevict"
MAX_README_WORDS = 1000  # three minutes
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)+\.(?:py|cpp|hpp|cu|cuh|md|json|toml|yaml|csv|png|svg|txt)")
FLAG = re.compile(r"--[a-z][a-z0-9-]*")
# command of a block -> the file that runs it, and what it says of it there
RUN_BY = {
    "make demo": (".ci/run", "make demo"),
    "vllm serve MODEL": ("tests/engine/test_pages.py", "vllm serve"),
    "pip install ./examples/third_party_policy": ("tests/e2e/conftest.py", "third_party_policy"),
    "python -m vllm_kvevict policies": ("tests/e2e/test_example_policy.py", '"vllm_kvevict", "policies"'),
    "python -m vllm_kvevict calibrate": ("tests/e2e/test_auto_budget_over_http.py", "calibrate"),
    "kvevict inspect": ("tests/e2e/test_inspect.py", "inspect"),
}
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


def modules_of(text: str) -> Iterator[list[str]]:
    """``python -m MODULE ...`` of this checkout, and ``kvevict ...``, as [MODULE, ...]."""
    for words in commands_of(text, r"(?<![\w./])kvevict"):
        yield ["vllm_kvevict", *words[1:]]
    for words in commands_of(text, r"python3? -m"):
        if len(words) > 2 and words[2].split(".")[0] in ("vllm_kvevict", "tools", "benchmarks"):
            yield words[2:]


def file_of(module: str) -> Path | None:
    """What ``python -m MODULE`` runs, None if there is no such file."""
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path / "__main__.py", path.with_suffix(".py")) if file.is_file()), None)


def flags_in(tree: ast.AST) -> set[str]:
    """The flags that code adds to a parser."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "add_argument" in ast.unparse(node.func)]
    texts = [arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant)]
    return {text for text in texts if isinstance(text, str) and text.startswith("--")}


@cache
def flags_of_script(file: Path) -> frozenset[str]:
    """The flags of a script of tools/ or benchmarks/, those that functions it has imported add included."""
    tree = ast.parse(file.read_text())
    found = flags_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("tools", "benchmarks"):
            names = {alias.name for alias in node.names}
            helper = file_of(node.module or "")
            for part in ast.parse(helper.read_text()).body if helper else ():
                if isinstance(part, ast.FunctionDef) and part.name in names:
                    found |= flags_in(part)
    return frozenset(found)


@cache
def flags_of_vllm() -> frozenset[str]:
    """The flags of ``vllm serve``, from the sources of the installed vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    folder = Path(spec.origin).parent
    files = ("engine/arg_utils.py", "entrypoints/openai/cli_args.py", "utils/argparse_utils.py")
    texts = [(folder / file).read_text() for file in files if (folder / file).is_file()]
    return frozenset(FLAG.findall(" ".join(texts)))


@pytest.fixture
def flags_of_ours(capsys: pytest.CaptureFixture[str]) -> Callable[[str], set[str]]:
    """The flags that ``python -m vllm_kvevict COMMAND --help`` lists."""

    def flags(command: str) -> set[str]:
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0, f"there is no command {command!r}"
        return set(FLAG.findall(capsys.readouterr().out))

    return flags


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
def test_quoted_commands_exist(page: Path, flags_of_ours: Callable[[str], set[str]]) -> None:
    text, unknown = page.read_text(), []
    for module, *words in modules_of(text):
        file = file_of(module)
        assert file is not None, f"there is no {module}"
        flags = {word.partition("=")[0] for word in words if FLAG.match(word)}
        if module == "vllm_kvevict":  # what a command does not know goes to vLLM's engine
            known = flags_of_ours(words[0]) if words else set()
            if words and words[0] in ("check", "inspect", "calibrate") and flags - known:
                known |= flags_of_vllm()
        else:
            known = set(flags_of_script(file))
        unknown += [(module, flag) for flag in flags - known]
    for _, _, *words in commands_of(text, "vllm serve"):
        flags = {word.partition("=")[0] for word in words if FLAG.match(word)}
        ours = flags_of_ours("inspect")  # which takes the flags of the server
        if flags - ours:
            unknown += [("vllm serve", flag) for flag in flags - ours - flags_of_vllm()]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_blocks_are_run(page: Path) -> None:
    """Blocks of Python are run by e2e/test_http.py and engine/test_pages.py, or are the example's code."""
    for command in "".join(blocks_of(page, "bash")).splitlines():
        (known,) = [known for known in RUN_BY if command.startswith(known)]
        file, what = RUN_BY[known]
        assert what in (ROOT / file).read_text()


def test_commands_are_found_in_blocks_and_in_sentences() -> None:
    text = (
        "`python -m tools.demo\n--budget 1`, `kvevict check`.\n```bash\n"
        "vllm serve M \\\n  --port 1  # --no\n.venv/bin/python -m x\n```"
    )
    assert list(modules_of(text)) == [["vllm_kvevict", "check"], ["tools.demo", "--budget", "1"]]
    assert list(commands_of(text, "vllm serve")) == [["vllm", "serve", "M", "--port", "1"]]


def test_flags_of_scripts_are_found() -> None:
    study, table = file_of("benchmarks.quality.bench_policies"), file_of("tools.feature_table")
    assert study is not None and {"--questions", "--tasks"} <= flags_of_script(study)
    assert table is not None and flags_of_script(table) == {"--write"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_quoted_targets_of_make_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    quoted = [words[1].rstrip(":") for words in commands_of(page.read_text(), "make") if len(words) > 1]
    assert not [target for target in quoted if target not in targets]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_quoted_files_exist(page: Path) -> None:
    spans = [span for span in code_of(page.read_text()) if PATH.fullmatch(span)]
    files = [span for span in spans if not span.startswith(NOT_OURS) and "NAME" not in span]
    folders = (ROOT, PACKAGE, ROOT / "tests", page.parent)
    assert not [file for file in files if not any((folder / file).is_file() for folder in folders)]


def test_the_picture_is_that_of_its_script() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(), "run `python -m tools.picture`"


def test_the_page_of_architecture_names_every_room_from_the_lowest_to_the_highest() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.partition("\n## Rooms of the package\n")[2].partition("\n## ")[0]
    rooms = [row[3:].partition("`")[0] for row in section.splitlines() if row.startswith("| `")]
    named = [room.rstrip("/").removesuffix(".py").replace("/", ".") for room in rooms]
    assert sorted(named) == sorted(MAY_IMPORT)
    for place, room in enumerate(named):
        assert not set(MAY_IMPORT[room]) - set(named[:place])


def test_the_page_of_configuration_is_one_table_of_all_options(flags_of_ours: Callable[[str], set[str]]) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    ours = {flag for flag in flags_of_ours("inspect") if flag.startswith("--kv-")}
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
