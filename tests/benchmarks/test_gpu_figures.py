"""The figures of GPU kernels: one is compiled, without a GPU; the estimate of occupancy is checked by hand."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import gpu_figures
from benchmarks.kernels.gpu_figures import LIMITS, Figures, assemble, compile_cuda, occupancy

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, of the CUDA toolkit, is not installed")
STACK = """
extern "C" __global__ void __launch_bounds__(128) stack(int* x, int n) {
  int a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i];
  for (int i = 0; i < 64; ++i) a[x[i]] += a[i];  // registers have no index that is known only now
  x[n] = a[n];
}
"""


def test_a_triton_kernel_is_compiled_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton, which brings its own ptxas, is not installed")
    command = [sys.executable, "-m", "benchmarks.kernels.gpu_figures", "expand_page_table", "--capabilities", "90"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "Compiled, not run on a GPU." in run.stdout
    assert (tmp_path / "gpu_figures.md").read_text() == run.stdout
    with (tmp_path / "gpu_figures.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["kernel"] == "_expand_page_table_kernel"
    assert row["architecture"] == "sm_90"
    assert 16 <= int(row["registers"]) <= 64
    assert row["spill_bytes"] == row["stack_bytes"] == "0"


@needs_nvcc
@pytest.mark.parametrize("capability", LIMITS)
def test_a_cuda_kernel_is_compiled_and_its_stack_frame_found(tmp_path: Path, capability: int) -> None:
    (tmp_path / "stack.cu").write_text(STACK)
    (row,) = compile_cuda(tmp_path / "stack.cu", capability)
    assert (row.language, row.kernel, row.warps) == ("CUDA", "stack", 4)
    assert row.stack_bytes >= 256


@needs_nvcc
def test_what_ptxas_refuses_is_an_error() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        assemble("not PTX", "ptxas", "sm_80", ())


@pytest.mark.parametrize(
    "warps, registers, shared, expected",
    [
        (4, 32, 0, 1.0),
        (1, 32, 0, 0.5),  # 32 blocks
        (8, 255, 0, 0.125),  # 8,192 registers a warp: 2 warps in each quarter
        (4, 168, 0, 0.1875),  # 5,376 registers a warp: 3 warps in each quarter
        (4, 32, 48 * 1024, 0.1875),  # 3 blocks of 49 KiB in 164 KiB
    ],
)
def test_occupancy_on_an_a100(warps: int, registers: int, shared: int, expected: float) -> None:
    assert occupancy(LIMITS[80], warps, registers, shared) == expected


def test_spills_fail_and_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compile_triton(kernel: str, capability: int) -> Figures:
        return Figures("Triton", kernel, "", f"sm_{capability}", 4, 255, 0, 8 * (capability == 90), 0, 0.125)

    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # restored: the script removes it
    monkeypatch.setattr(gpu_figures, "triton_kernels", lambda only: [("wide",)])
    monkeypatch.setattr(gpu_figures, "compile_triton", compile_triton)
    monkeypatch.setattr(sys, "argv", ["gpu_figures", "wide", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"registers are spilled to memory by: wide sm_90$"):
        gpu_figures.main()
