"""Builds the optional CPU kernels; everything else about the package is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "vllm_kvevict._cpu",
            sources=sorted(glob("csrc/cpu/*.cpp")),
            depends=sorted(glob("csrc/cpu/*.hpp")),
            # -Wno-psabi: vectors wider than the baseline are never passed between translation units
            extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"],
            extra_link_args=["-fopenmp"],
            # no compiler means no kernels, not a failed installation: the torch references take over
            optional=True,
        )
    ]
)
