"""The compiled kernels are found once, and their absence is said once."""

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


def test_the_kernels_share_the_openmp_runtime_of_torch():
    """A second one would have threads of its own. Other packages may bring one, but not into this process."""
    if native.library() is None:
        pytest.skip("the CPU kernels are not built: run `python setup.py build_ext --inplace`")
    code = "from vllm_kvevict.kernels.native import library; library(); print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if re.search(r"lib(gomp|iomp5|omp)[.-]", line)]
    (runtime,) = {line.split()[-1] for line in lines}
    assert Path(torch.__file__).resolve().parent in Path(runtime).resolve().parents
