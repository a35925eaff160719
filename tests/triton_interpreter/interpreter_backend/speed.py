"""What lets the interpreter run an engine in less time, without a change in what its kernels compute.

Triton's own patches ``triton.language`` anew for every launch and for every call of a function within a kernel, by a
look at all of its members. Here it is patched once and stays so. Triton's checks every sum, difference and product for
overflow, which a GPU does not; tests/kernels runs our own kernels with that check.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

INTERPRETER = "triton.runtime.interpreter"


def hurry_when_imported() -> None:
    """Mend Triton's interpreter as soon as it is imported: when a backend is, Triton itself is only half imported."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != INTERPRETER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Mending(spec.loader)
        return spec


class _Mending(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _hurry(module)


def _hurry(interpreter: Any) -> None:
    patch_lang, patched = interpreter._patch_lang, set()

    def patched_once(fn: Callable[..., Any]) -> Any:
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch_lang(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patched_once
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
