"""The folder of the newest vLLM: its Python, the installed extensions, and which calls of theirs do not fit."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch
import vllm
from vllm.platforms import current_platform

from tests.engine.conftest import NEEDED_BY, calls_that_differ
from tools import newest_vllm
from tools.newest_vllm import OpCall, op_calls, problem

SAY_VERSION = "import vllm, importlib.metadata; print(vllm.__file__, importlib.metadata.version('vllm'))"
on_the_newest = pytest.mark.skipif(
    not newest_vllm.is_used(), reason="runs where the newest vLLM is first on PYTHONPATH"
)


@on_the_newest
def test_python_is_of_the_newest_vllm_and_the_extensions_are_the_installed_ones() -> None:
    assert version("vllm") == f"{newest_vllm.NEWEST}+cpu" and vllm.__version__ == newest_vllm.NEWEST
    assert Path(vllm.__file__).parent == newest_vllm.FOLDER / "vllm"
    assert current_platform.is_cpu()
    current_platform.import_kernels()
    maps = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "abi3.so" in line]
    loaded = {Path(file).resolve() for file in maps if "/vllm/" in file}
    assert loaded and loaded <= set(newest_vllm.extensions(newest_vllm.installed_vllm()))


@on_the_newest
def test_a_process_that_a_test_starts_has_the_same_vllm(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAY_VERSION]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split()[-2:] == [vllm.__file__, version("vllm")]


def test_vllm_finds_our_plugin() -> None:
    (found,) = [each for each in entry_points(group="vllm.general_plugins") if each.name == "kvevict"]
    assert found.value == "vllm_kvevict:register"


@on_the_newest
def test_somebody_has_looked_at_every_call_that_the_extensions_refuse() -> None:
    assert calls_that_differ().keys() <= NEEDED_BY.keys()


def test_a_wheel_that_cannot_be_downloaded_is_named_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newest_vllm, "WHEELS", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(newest_vllm.NewestVLLMError) as error:
        newest_vllm.download()
    assert str(error.value).startswith(
        f"the wheel of vllm {newest_vllm.NEWEST} could not be downloaded into {tmp_path}: "
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("num_positional", "keywords", "wrong"),
    [
        (2, (), None),
        (1, ("other",), None),
        (2, ("alpha",), None),
        (1, (), "gives 1 arguments, the operator takes 3"),
        (4, (), "gives 4 arguments, the operator takes 3"),
        (2, ("beta",), "gives 2, beta= arguments, the operator takes 3"),
    ],
)
def test_a_call_that_an_operator_does_not_take_is_found(
    num_positional: int, keywords: tuple[str, ...], wrong: str | None
) -> None:
    library = torch.library.Library("kvevict_test", "FRAGMENT")
    if not torch._C._jit_get_schemas_for_operator("kvevict_test::add"):
        library.define("add(Tensor self, Tensor other, float alpha=1.0) -> Tensor")
    assert problem(OpCall("kvevict_test::add", "here", num_positional, keywords, False)) == wrong


def test_an_operator_that_is_not_there_is_found() -> None:
    assert problem(OpCall("kvevict_test::gone", "here", 0, (), False)) == "calls an operator that is not there"


def test_calls_are_read_from_the_source(tmp_path: Path) -> None:
    (tmp_path / "ops.py").write_text(
        "import torch\n"
        "def add(x, *more):\n"
        "    torch.ops._C.add(x, x, alpha=2)\n"
        "    return torch.ops._C.sum.default(*more)\n"
    )
    assert list(op_calls(tmp_path)) == [
        OpCall("_C::add", "ops.py:add", 2, ("alpha",), False),
        OpCall("_C::sum", "ops.py:add", 1, (), True),
    ]
