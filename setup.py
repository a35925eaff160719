"""Builds the optional kernels, for CPUs and for CUDA; everything else about the package is in pyproject.toml."""

import shutil
from glob import glob
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent / "csrc"
INTERFACE = "csrc/interface.cpp"  # in both libraries
NVCC = shutil.which("nvcc")
# machine code for two generations, and PTX for those that come later
CUDA_TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]")


def interface(folder: str) -> tuple[str, str]:
    """Return the macro that says from which declarations a library was built."""
    declared = run_path(str(CSRC / "declarations.py"))["declarations"](CSRC / folder)
    digest = run_path("vllm_kvevict/kernels/interface.py")["digest"](declared)
    return "KVEVICT_INTERFACE", f'"{digest}"'


cpu = Extension(
    "vllm_kvevict._cpu",
    sources=[*sorted(glob("csrc/cpu/*.cpp")), INTERFACE],
    depends=sorted(glob("csrc/cpu/*.hpp")),
    define_macros=[interface("cpu")],
    # -Wno-psabi: vectors wider than the baseline are never passed between translation units
    extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"],
    extra_link_args=["-fopenmp"],
    # no compiler means no kernels, not a failed installation: the torch references take over
    optional=True,
)
cuda = Extension(
    "vllm_kvevict._cuda",
    sources=[*sorted(glob("csrc/cuda/*.cu")), INTERFACE],
    depends=sorted(glob("csrc/cuda/*.cuh")),
    define_macros=[interface("cuda")],
    extra_compile_args=[f"-gencode={target}" for target in CUDA_TARGETS],
    optional=True,
)


class BuildKernels(build_ext):
    """Gives CUDA sources to nvcc, which needs nothing of Python or torch; their runtime library is the one of torch.

    Libraries are named without the ABI of a Python: they are loaded with ctypes, by any.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        if ext is not cuda:
            return super().build_extension(ext)
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(target.rpartition("/")[0])
        options = [
            "-std=c++17",
            "-O3",
            "-shared",
            "-cudart=shared",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            *ext.extra_compile_args,
        ]
        options += [f"-D{name}={value}" for name, value in ext.define_macros]
        self.spawn([NVCC, *options, "-o", target, *ext.sources])


class Wheel(bdist_wheel):
    """One for every Python, and for this machine only: tools/release.py makes it one for older systems, too."""

    def get_tag(self) -> tuple[str, str, str]:
        if not any(Path(self.bdist_dir).rglob("*.so")):
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[cpu, cuda] if NVCC else [cpu],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
