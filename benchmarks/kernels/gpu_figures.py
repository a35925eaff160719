"""What our GPU kernels take of a GPU, from their compilers alone: compiled, not run on a GPU.

python -m benchmarks.kernels.gpu_figures

Triton kernels are those that a module of vllm_kvevict/kernels names in ``triton_signatures()``, CUDA kernels those of
csrc/cuda, where nvcc is installed. Fails if a kernel spills registers or has a stack frame.

Occupancy is an estimate: the share of a multiprocessor's warps that can be resident, from registers, shared memory and
warps of a block alone, by the limits in ``LIMITS`` (CUDA C++ Programming Guide, "Compute Capabilities"). The dynamic
shared memory of a CUDA kernel is chosen at its launch and not counted.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS
from vllm_kvevict import kernels
from vllm_kvevict.kernels.optional_triton import triton

CUDA_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
NOTICE = "Compiled, not run on a GPU. Occupancy is an estimate from registers, shared memory and warps."
WARP_SIZE = 32


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has, in bytes where not said otherwise; a block takes 1 KiB of shared memory for itself."""

    warps: int
    blocks: int
    shared: int
    registers: int = 65536
    registers_granularity: int = 256  # of one warp
    quarters: int = 4  # each has a quarter of the registers
    shared_reserved: int = 1024
    shared_granularity: int = 128


LIMITS = {80: Limits(64, 32, 164 * 1024), 90: Limits(64, 32, 228 * 1024), 100: Limits(64, 32, 228 * 1024)}


@dataclass(frozen=True)
class Figures:
    """One kernel on one architecture. occupancy and warps are None for a kernel that states no block size."""

    language: str
    kernel: str
    constants: str
    architecture: str
    warps: int | None
    registers: int
    shared_bytes: int
    spill_bytes: int
    stack_bytes: int
    occupancy: float | None


def occupancy(limits: Limits, warps: int, registers: int, shared: int) -> float:
    """Return the share of a multiprocessor's warps that blocks of this kind can fill."""
    per_warp = _round_up(registers * WARP_SIZE, limits.registers_granularity)
    by_registers = limits.quarters * (limits.registers // limits.quarters // per_warp) // warps
    by_shared = limits.shared // _round_up(shared + limits.shared_reserved, limits.shared_granularity)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared) * warps / limits.warps


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def assemble(ptx: str, ptxas: str, target: str, flags: tuple[str, ...]) -> dict[str, tuple[int | None, list[int]]]:
    """Return, per entry of some PTX, its warps and what ptxas says: registers, static shared, spill and stack bytes."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", *flags, f"--gpu-name={target}", str(source), "-o", str(source.with_suffix(".cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {}
    for part in re.split(r"Compiling entry function '", log.stdout + log.stderr)[1:]:
        name = part[: part.index("'")]
        threads = re.search(rf"\.entry {re.escape(name)}\b[^{{]*?\.(?:max|req)ntid (\d+)", ptx)
        numbers = [
            re.search(rf"(\d+) {what}", part)
            for what in ("registers", "bytes smem", "bytes spill stores", "bytes stack")
        ]
        warps = int(threads[1]) // WARP_SIZE if threads else None
        found[name] = warps, [int(number[1]) if number else 0 for number in numbers]
    return found


def figures(
    language: str, name: str, constants: str, capability: int, warps: int | None, numbers: list[int]
) -> Figures:
    registers, shared, spill, stack = numbers
    share = None if warps is None else occupancy(LIMITS[capability], warps, registers, shared)
    return Figures(language, name, constants, f"sm_{capability}", warps, registers, shared, spill, stack, share)


def triton_kernels(only: list[str]) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Find what the modules of kernels/ want compiled; ``only`` some modules, if any are named."""
    for module in sorted(info.name for info in pkgutil.iter_modules(kernels.__path__)):
        signatures = getattr(importlib.import_module(f"{kernels.__name__}.{module}"), "triton_signatures", None)
        if signatures is not None and (not only or module in only):
            yield from signatures()


def compile_triton(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, capability: int
) -> Figures:
    """Compile for a GPU that need not be there.

    Pointers are multiples of 16 bytes, as those of whole tensors are, but for those that a kernel says may be none.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in kernel.params
        if signature[parameter.name].startswith("*") and not parameter.do_not_specialize_on_alignment
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP_SIZE), options={"num_warps": warps})
    # the flags of Triton itself
    target, flags = sm_arch_from_capability(capability), ("-lineinfo", "--regAllocOptLevel=2")
    (assembled,) = assemble(compiled.asm["ptx"], get_ptxas(capability).path, target, flags).values()
    registers, _, spill, stack = assembled[1]
    described = " ".join(f"{name}={value}" for name, value in constants.items())
    numbers = [registers, compiled.metadata.shared, spill, stack]
    return figures("Triton", kernel.__name__, described, capability, warps, numbers)


def compile_cuda(path: Path, capability: int) -> Iterator[Figures]:
    """Compile a file of csrc/cuda; nothing is run."""
    target = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={target}", "-ptx", str(path), "-o", "-"]
    ptx = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name, (warps, numbers) in assemble(ptx, shutil.which("ptxas") or "ptxas", target, ()).items():
        yield figures("CUDA", _demangled(name), "", capability, warps, numbers)


def _demangled(name: str) -> str:
    if shutil.which("c++filt") is None:
        return name
    readable = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    readable = readable.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r"\(.*", "", readable)


def table(rows: list[Figures]) -> str:
    """Return the figures as a markdown table."""
    names = [field.name for field in fields(Figures)]
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    for row in rows:
        values = asdict(row) | {"occupancy": "" if row.occupancy is None else f"{row.occupancy:.0%}"}
        lines.append(" | ".join("" if value is None else str(value) for value in values.values()))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="of vllm_kvevict/kernels, or files of csrc/cuda; default: all")
    parser.add_argument("--capabilities", type=int, nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu_figures.csv and .md")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # read where a kernel is defined: interpreted ones cannot be compiled
    rows = []
    for kernel in triton_kernels(arguments.modules):
        rows += [compile_triton(*kernel, capability) for capability in arguments.capabilities]
    sources = [
        path for path in sorted(CUDA_SOURCES.glob("*.cu")) if not arguments.modules or path.stem in arguments.modules
    ]
    if sources and shutil.which("nvcc") is None:
        print(f"nvcc is not installed: left out {', '.join(path.name for path in sources)}")
        sources = []
    for path in sources:
        rows += [row for capability in arguments.capabilities for row in compile_cuda(path, capability)]
    if not rows:
        raise SystemExit("no kernel found")
    print(f"{NOTICE}\n\n{table(rows)}")
    (arguments.out / "gpu_figures.md").write_text(f"{NOTICE}\n\n{table(rows)}\n")
    with (arguments.out / "gpu_figures.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Figures)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    spilling = [f"{row.kernel} {row.architecture}" for row in rows if row.spill_bytes or row.stack_bytes]
    if spilling:
        raise SystemExit(f"registers are spilled to memory by: {', '.join(spilling)}")


if __name__ == "__main__":
    main()
