"""The compiled kernels are found once, and their absence is said once."""

from importlib.machinery import EXTENSION_SUFFIXES

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


def test_unloadable_library_is_an_error(monkeypatch, tmp_path):
    (tmp_path / f"_cpu{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    native.library.cache_clear()
    try:
        with pytest.raises(OSError, match="_cpu"):
            native.library()
    finally:
        native.library.cache_clear()


@pytest.mark.parametrize(("device", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_worker_checks_the_library_of_its_device(monkeypatch, tmp_path, device, other):
    (tmp_path / f"_{device}{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    for find in (native.library, native.cuda_library):
        find.cache_clear()
    try:
        native.check(torch.device(other))
        with pytest.raises(OSError, match=f"_{device}"):
            native.check(torch.device(device))
    finally:
        for find in (native.library, native.cuda_library):
            find.cache_clear()
