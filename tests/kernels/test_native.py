"""The compiled kernels are found once, and their absence is said once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_kvevict.kernels import native


def test_missing_library_is_logged_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    monkeypatch.setattr(native.logger, "propagate", False)
    native.logger.addHandler(caplog.handler)
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert native.library() is None
    finally:
        native.library.cache_clear()
        native.logger.removeHandler(caplog.handler)
    assert len(caplog.records) == 1
    assert "build_ext --inplace" in caplog.text


def test_library_is_loaded_once():
    assert native.library() is native.library()


@pytest.mark.parametrize(("device", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_worker_hears_once_that_the_library_of_its_device_cannot_be_loaded(
    monkeypatch, caplog, tmp_path, device, other
):
    """As without the OpenMP or CUDA runtime that it needs: slower code runs in its place."""
    library = tmp_path / f"_{device}.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    monkeypatch.setattr(native.logger, "propagate", False)
    native.logger.addHandler(caplog.handler)
    finds = {"cpu": native.library, "cuda": native.cuda_library}
    for find in finds.values():
        find.cache_clear()
    try:
        native.check(torch.device(other))
        assert str(library) not in caplog.text
        caplog.clear()
        native.check(torch.device(device))
        native.check(torch.device(device))
        assert finds[device]() is None
    finally:
        for find in finds.values():
            find.cache_clear()
        native.logger.removeHandler(caplog.handler)
    (record,) = caplog.records
    assert f"{library} cannot be loaded" in record.getMessage()


def test_the_kernels_share_the_openmp_runtime_of_torch(tmp_path):
    """A second one would have threads of its own. Other packages may bring one, but not into this process."""
    if native.library() is None:
        pytest.skip("the CPU kernels are not built: run `python setup.py build_ext --inplace`")
    (runtime,) = openmp_runtimes("library()", tmp_path)
    assert Path(torch.__file__).resolve().parent in Path(runtime).resolve().parents


def test_a_second_openmp_runtime_is_not_taken_in(tmp_path):
    """A torch whose runtime has another name: the loader would take one that the system has by the name it seeks."""
    if native.library() is None:
        pytest.skip("the CPU kernels are not built: run `python setup.py build_ext --inplace`")
    (runtime,) = openmp_runtimes("library()", tmp_path)
    (needed,) = native.runtimes_of(str(native.PACKAGE / "_cpu.so"))
    other = needed[:-1] + "7"  # of the same length
    (tmp_path / other).write_bytes(Path(runtime).read_bytes())
    ours = (native.PACKAGE / "_cpu.so").read_bytes()
    (tmp_path / "_cpu.so").write_bytes(ours.replace(needed.encode(), other.encode()))
    with pytest.raises(OSError, match=f"needs {other}, which torch has not brought"):
        native.load(str(tmp_path / "_cpu.so"), native.SIGNATURES)
    assert openmp_runtimes(f"ctypes.CDLL('{tmp_path}/_cpu.so')", tmp_path) > {runtime}  # so it would have been
    assert openmp_runtimes(f"_load_or_log(Path('{tmp_path}/_cpu.so'), SIGNATURES)", tmp_path) == {runtime}


def openmp_runtimes(code, search_path):
    """Return the files of OpenMP runtimes that a process has mapped after ``code``, which sees names of ``native``."""
    code = f"from vllm_kvevict.kernels.native import *\n{code}\nprint(open('/proc/self/maps').read())"
    code = f"from vllm_kvevict.kernels.native import _load_or_log\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_LIBRARY_PATH": str(search_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if re.search(r"lib(gomp|iomp5|omp)[.-]", line)]
    return {line.split()[-1] for line in lines}
