"""Every command that the pages quote is read by its program, and is run by a test or has a reason why none does."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.pages import COMMAND, DOCS, EXAMPLE, PAGES, blocks_of, commands_of, quoted_commands
from tests.read_commands import read, run_module
from vllm_kvevict.policies import POLICIES

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # what run_module runs once more
COMMANDS = quoted_commands()
# a command, or how it begins -> the file of the tree that it makes again, here
MAKES = {
    "kvevict policies --write": "docs/policies.md",
    "python -m tools.feature_table": "docs/compatibility.md",
    "python -m tools.matrix.table": "docs/compatibility.md",
    "python -m tools.option_table": "docs/configuration.md",
    "python -m tools.picture": "docs/images/eviction.svg",
    "python -m tools.second_tier": "CONTRIBUTING.md",
}
SMALL_RUNS = "tests/benchmarks/test_small_runs.py"
# the same -> the file that runs it, and what it says of it there
RUN_BY = {
    "kvevict calibrate": ("tests/e2e/test_auto_budget_over_http.py", 'main(["calibrate"'),
    "kvevict check": ("tests/engine/test_check.py", '"vllm_kvevict", "check"'),
    "kvevict inspect": ("tests/e2e/test_inspect.py", '"vllm_kvevict", "inspect"'),
    "kvevict policies": ("tests/e2e/test_example_policy.py", '"vllm_kvevict", "policies"'),
    "make build": ("tests/test_packaging.py", "build(checkout, checkout"),
    "make demo": (".ci/run", "make demo"),
    "make docs": ("tests/test_site.py", '"mkdocs", "build", "--strict", "--quiet"'),
    "make help": ("tests/test_page_commands.py", '["make", "help"]'),
    "make models": ("Makefile", "test: lint models newest"),
    "make newest": ("Makefile", "test: lint models newest"),
    "make release": ("tests/test_packaging.py", "build(checkout, checkout"),
    "make setup": ("Makefile", "lint: setup"),
    "make test": (".ci/run", "make test"),
    "make test-more": (".ci/run", "make test-more"),
    "make test-release": ("Makefile", "$(MAKE) test-release"),
    "pip install --group test": ("tools/setup_venv.py", 'pip_install(TORCH, *GROUPS["test"]'),
    "pip install --no-deps": ("tests/test_packaging.py", '"--no-deps"'),
    "pip install ./examples/third_party_policy": ("tests/e2e/conftest.py", '"examples" / "third_party_policy"'),
    "pip uninstall vllm-kvevict": ("tests/test_packaging.py", '"uninstall", "--yes", "vllm-kvevict"'),
    "python -m benchmarks.kernels.gpu_figures": ("tests/benchmarks/test_gpu_figures.py", '"benchmarks.kernels.gpu_'),
    "python -m benchmarks.quality.bench_allocators": (SMALL_RUNS, '.bench_allocators": SmallRun('),
    "python -m benchmarks.quality.bench_auto": (SMALL_RUNS, '.bench_auto": SmallRun('),
    "python -m benchmarks.quality.bench_policies": (SMALL_RUNS, '.bench_policies": SmallRun('),
    "python -m benchmarks.quality.bench_schedules": (SMALL_RUNS, '.bench_schedules": SmallRun('),
    "python -m benchmarks.report": ("tests/benchmarks/test_report.py", "main()"),
    "python -m benchmarks.serving.bench_concurrency": (SMALL_RUNS, '.bench_concurrency": SmallRun('),
    "python -m benchmarks.serving.bench_decode": (SMALL_RUNS, '.bench_decode": SmallRun('),
    "python -m benchmarks.serving.bench_evicted_decode": (SMALL_RUNS, '.bench_evicted_decode": SmallRun('),
    "python -m benchmarks.serving.bench_eviction_cost": (SMALL_RUNS, '.bench_eviction_cost": SmallRun('),
    "python -m benchmarks.serving.bench_long_answers": (SMALL_RUNS, '.bench_long_answers": SmallRun('),
    "python -m benchmarks.serving.bench_multi_turn": (SMALL_RUNS, '.bench_multi_turn": SmallRun('),
    "python -m benchmarks.serving.bench_overhead": (SMALL_RUNS, '.bench_overhead": SmallRun('),
    "python -m benchmarks.serving.bench_short_answers": (SMALL_RUNS, '.bench_short_answers": SmallRun('),
    "python -m benchmarks.serving.gpu_engine": ("tests/benchmarks/test_gpu_engine.py", '["gpu_engine", write('),
    "python -m benchmarks.serving.soak": ("tests/benchmarks/test_soak.py", "run("),
    "python -m tools.build_model": ("Makefile", "$(VENV_PYTHON) -m tools.build_model\n"),
    "python -m benchmarks.serving.bench_workloads": (
        "tests/benchmarks/test_small_servers.py",
        "bench_workloads.main()",
    ),
    "python -m tools.dashboard": ("tests/benchmarks/test_small_servers.py", "dashboard.main()"),
    "python -m tools.gpu compare": ("tests/tools/test_gpu_compare.py", 'main(["compare"'),
    "python -m tools.gpu run --dry-run": ("tests/benchmarks/test_small_servers.py", 'gpu(["run", "--dry-run"'),
    "python -m tools.screenshots": ("tests/benchmarks/test_small_servers.py", "screenshots.main()"),
    "python -m tools.upstream": ("tests/engine/test_upstream.py", "findings("),
    "python setup.py build_ext": ("tools/setup_venv.py", '"--editable", str(ROOT)'),
    "vllm serve": ("tests/e2e/conftest.py", "Server(smollm2"),
    "vllm serve --help=KVEviction": ("tests/read_commands.py", "cli.main()"),
}
DOCKER, GPU, LONG, NETWORK, SUITE = "a Docker daemon", "a GPU", "minutes to hours", "a network", "it is this suite"
# the same -> what it needs, or why not
NOT_RUN = {
    ".ci/run": SUITE,
    "diff -u": NETWORK,
    "docker": DOCKER,
    "make gpu-pack": NETWORK,
    "make matrix": LONG,
    "pip install -e .[gpu]": GPU,
    "pip install .[gpu]": GPU,
    "python -m benchmarks.kernels.gpu_rates": GPU,
    "python -m pytest": SUITE,
    "python -m tools.gpu run": GPU,
    "python -m tools.gpu run --reference": LONG,
    "python -m tools.upstream 0.34.0": NETWORK,
}


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the files that commands name."""
    (limits,) = [block for page in DOCS for block in blocks_of(page, "yaml") if block.startswith("# limits.yaml")]
    (tmp_path / "limits.yaml").write_text(limits)
    calibration = {"model": str(tiny_llama), "policies": {"compactor": {"alpha": 1.0, "beta": -8.0}}}
    (tmp_path / "calibration.json").write_text(json.dumps(calibration))
    (tmp_path / "text.txt").write_text("A text.")
    for file in MAKES.values():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def example_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setitem(POLICIES._classes, "fading_norm", importlib.import_module("fading_norm").FadingNorm)


def row_of(command: Sequence[str]) -> str | None:
    """The longest row that a command begins with."""
    found = [row for row in (*MAKES, *RUN_BY, *NOT_RUN) if tuple(row.split()) == tuple(command[: len(row.split())])]
    return max(found, key=len, default=None)


@pytest.mark.usefixtures("folder", "example_policy")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_is_read_by_its_program(
    command: tuple[str, ...], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(command, monkeypatch, tiny_llama)


def test_every_command_is_run_by_a_test_or_has_a_reason() -> None:
    row_by_command = {command: row_of(command) for command in COMMANDS}
    assert not [command for command, row in row_by_command.items() if row is None], "give it a row above"
    rows = Counter([*MAKES, *RUN_BY, *NOT_RUN])
    assert rows == Counter({*row_by_command.values()}), "a row is stale, or there twice"


@pytest.mark.parametrize("row", RUN_BY)
def test_the_file_that_runs_a_command_says_so(row: str) -> None:
    file, what = RUN_BY[row]
    assert what in (ROOT / file).read_text()


@pytest.mark.parametrize("row", MAKES)
def test_a_file_of_the_tree_is_as_its_command_makes_it(row: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = [command for command in COMMANDS if row_of(command) == row]
    program, *words = command
    file = folder / MAKES[row]
    before = file.read_text()
    table = re.compile(rf"(<!-- [a-z ]+: {re.escape(' '.join(command))} -->\n).*?(\n<!-- end)", re.DOTALL)
    file.write_text(table.sub(r"\1\2", before) if file.suffix == ".md" else "")
    module, *words = ["vllm_kvevict", *words] if program == "kvevict" else words[1:]
    if "--write" not in words:
        words += ["--write", MAKES[row]]
    with suppress(SystemExit):
        run_module(module, words, monkeypatch)
    assert file.read_text() == before, f"run `{' '.join(command)}`"


def test_make_lists_the_targets_that_are_quoted() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall("^([a-z-]+):", done.stdout, re.MULTILINE)
    assert {command[1] for command in COMMANDS if command[0] == "make"} <= {*listed}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_block_of_commands_has_no_others(page: Path) -> None:
    """Blocks of Python are run by e2e/test_http.py and engine/test_pages.py, or are the example's code."""
    lines = "".join(blocks_of(page, "bash")).replace("\\\n", " ").splitlines()
    assert not [line for line in lines if not re.fullmatch(rf"{COMMAND.pattern}|\w+=\S+", line)]


WRONG = """Neither `make`, a name, nor `kvevict check`, the name of a command, nor
`python3 -m tools.gpu run
--out FOLDER` is wrong. These are:
```bash
kvevict inspect --model MODEL --prompt-file text.txt --kv-eviction lava --kv-budget 0 --out x.html
kvevict inspect --model MODEL --prompt-file text.txt --kv-eviction lava --kv-budget 512 \\
    --out x.html --max-model-length 8192  # vLLM's
VARIABLE=1 vllm serve MODEL --kv-eviction snapkv --kv-budget 0
vllm serve MODEL --kv-eviction snapkv --kv-budget 256 --kv-budget-allocators adakv
python -m tools.no_such_module
python -m tools.gpu run --out FOLDER no_such_run
python -m benchmarks.serving.bench_workloads --workload memory
.venv/bin/python -m pytest tests/no_such_folder
make no-such-target
make test PYTEST_ARGS="--no-such-flag"
make demo NO_SUCH_VARIABLE=1
pip install '.[no_such_extra]'
python setup.py no_such_command
docker build --file deploy/no_such_file .
```"""
RIGHT, FAULTS = list(commands_of(WRONG))[-2:], list(commands_of(WRONG))[:-2]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", FAULTS, ids=" ".join)
def test_a_wrong_command_is_found(command: tuple[str, ...], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, ImportError, SystemExit, ValueError, pytest.UsageError)):
        read(command, monkeypatch, tiny_llama)


def test_commands_are_found_in_blocks_and_in_sentences() -> None:
    assert RIGHT == [("kvevict", "check"), ("python", "-m", "tools.gpu", "run", "--out", "FOLDER")]
    assert len(FAULTS) == 14 and FAULTS[1][-2:] == ("--max-model-length", "8192")
    assert row_of(("make", "tests")) is None and row_of(("make", "test", "X=1")) == "make test"
