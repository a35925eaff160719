"""The CUDA sources compile for the GPUs they are meant for, without spills, whatever GPU is here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc to compile CUDA sources")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, architecture, tmp_path):
    options = ["-std=c++17", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command = [NVCC, "-cubin", f"-arch={architecture}", *options, "-o", str(tmp_path / "out.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout + done.stderr)
    assert spills
    assert all(pair == ("0", "0") for pair in spills), done.stderr


@pytest.mark.parametrize("source", sorted(CUDA.iterdir()), ids=lambda path: path.name)
def test_needs_no_torch(source):
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text())
