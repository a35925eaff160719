"""The compiled kernels are found once, and their absence is said once."""

import logging
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

from vllm_kvevict.kernels import native


def test_missing_library_is_logged_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger=native.__name__):
            assert native.library() is None
            assert native.library() is None
    finally:
        native.library.cache_clear()
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
