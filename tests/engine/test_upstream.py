"""What we rely on in vLLM is there: in the installed one, and in the source of the newest one that we say we support.

The newest one is downloaded, once, into .cache/wheels, and only read: its classes from their syntax trees, in a wheel.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_kvevict import kv_eviction_args
from vllm_kvevict.engine import versions
from vllm_kvevict.engine.install import _FLAG_PATCHES, _REQUEST_PATCHES, install_flags

ROOT = Path(__file__).resolve().parents[2]
ENGINE = sorted((ROOT / "vllm_kvevict" / "engine").glob("*.py"))
NEWEST = "0.33.0"
PLATFORM = "manylinux_2_28_x86_64"
# what we read or set by name: the module whose source must hold it as an attribute
ATTRIBUTES = {
    "vllm.v1.core.sched.scheduler": [
        "connector",
        "finished_req_ids",
        "grammar_compile_error_reqs",
        "kv_cache_manager",
        "num_scheduled_tokens",
        "requests",
        "vllm_config",
    ],
    "vllm.v1.core.kv_cache_manager": ["coordinator", "block_pool"],
    "vllm.v1.core.kv_cache_coordinator": ["single_type_managers"],
    "vllm.v1.core.single_type_kv_cache_manager": ["kv_cache_group_id", "block_size", "kv_cache_spec"],
    "vllm.v1.request": ["is_prefill_chunk", "num_tokens", "resumable", "sampling_params", "request_id"],
    "vllm.v1.worker.gpu_model_runner": ["attn_groups", "input_batch", "req_ids"],
    "vllm.v1.worker.gpu.states": ["index_to_req_id"],
    "vllm.v1.worker.gpu_worker": ["model_runner", "vllm_config"],
    "vllm.v1.attention.backends.cpu_attn": [
        "isa",
        "num_kv_heads",
        "head_dim",
        "num_queries_per_kv",
        "head_size",
        "kv_cache_dtype",
    ],
    "vllm.model_executor.layers.attention.attention": [
        "_k_scale_float",
        "_v_scale_float",
        "kv_cache",
        "kv_cache_dtype",
    ],
}


class Wheel:
    """The modules of a vLLM that is not installed."""

    def __init__(self, path: Path) -> None:
        self._zip = ZipFile(path)
        self._files = set(self._zip.namelist())

    @cache  # noqa: B019  one wheel a session
    def module(self, name: str) -> ast.Module:
        stem = name.replace(".", "/")
        file = f"{stem}.py" if f"{stem}.py" in self._files else f"{stem}/__init__.py"
        return ast.parse(self._zip.read(file))

    def has(self, name: str) -> bool:
        stem = name.replace(".", "/")
        return bool({f"{stem}.py", f"{stem}/__init__.py"} & self._files)

    def names(self, module: str) -> dict[str, ast.AST]:
        """Return what a module defines or imports, wherever it stands in it outside of functions and classes."""
        return {name: node for node in _statements(self.module(module)) for name in _bound_names(node)}

    def find_class(self, module: str, name: str) -> tuple[str, ast.ClassDef]:
        """Follow imports to where a class is defined."""
        node = self.names(module)[name]
        if isinstance(node, ast.ImportFrom):
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            return self.find_class(node.module or "", original)
        assert isinstance(node, ast.ClassDef), f"{module}.{name} is not a class any more"
        return module, node

    def find_method(self, module: str, class_name: str, method: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """Return a method of a class or of its bases inside vLLM."""
        module, found = self.find_class(module, class_name)
        for node in found.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == method:
                return node
        for base in found.bases:
            if isinstance(base, ast.Name) and base.id in self.names(module):
                inherited = self.find_method(module, base.id, method)
                if inherited is not None:
                    return inherited
        return None


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _statements(node)


def _bound_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


@pytest.fixture(scope="module")
def wheel() -> Wheel:
    folder = ROOT / ".cache" / "wheels"
    found = sorted(folder.glob(f"vllm-{NEWEST}-*.whl"))
    if not found:
        target = ["--dest", str(folder), "--platform", PLATFORM, "--only-binary", ":all:", "--no-deps"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *target, f"vllm=={NEWEST}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        if done.returncode:
            pytest.skip(f"vllm {NEWEST} could not be downloaded: {done.stderr.strip().splitlines()[-1]}")
        found = sorted(folder.glob(f"vllm-{NEWEST}-*.whl"))
    return Wheel(found[0])


def imported_names() -> list[tuple[str, str]]:
    """Return (module, name) for everything that the engine folder imports from vLLM."""
    nodes = [node for file in ENGINE for node in ast.walk(ast.parse(file.read_text()))]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "vllm"]
    return sorted({(str(node.module), alias.name) for node in froms for alias in node.names})


def overridden_methods() -> list[tuple[str, str, str, tuple[str, ...]]]:
    """Return (module, class, method, named parameters of ours) for every method of vLLM that a subclass replaces."""
    found = set()
    for file in ENGINE:
        module = importlib.import_module(f"vllm_kvevict.engine.{file.stem}".removesuffix(".__init__"))
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                found |= set(_overrides(cls))
    return sorted(found)


def _overrides(cls: type) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    theirs = [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]
    for name, value in vars(cls).items():
        function = getattr(value, "__func__", value)
        if not inspect.isfunction(function) or name.startswith("__"):
            continue
        base = next((base for base in theirs if name in vars(base)), None)
        if base is not None:
            parameters = inspect.signature(function).parameters.values()
            named = (p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
            yield base.__module__, base.__name__, name, tuple(named)


@pytest.mark.compat
@pytest.mark.parametrize(("module", "name"), imported_names(), ids=".".join)
def test_what_we_import_is_there(wheel: Wheel, module: str, name: str) -> None:
    assert wheel.has(module), f"{module} is gone"
    assert name in wheel.names(module) or wheel.has(f"{module}.{name}")


@pytest.mark.compat
@pytest.mark.parametrize(
    ("module", "class_name", "method", "ours"),
    overridden_methods(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_we_override_takes_what_ours_does(
    wheel: Wheel, module: str, class_name: str, method: str, ours: tuple[str, ...]
) -> None:
    node = wheel.find_method(module, class_name, method)
    assert node is not None, f"{class_name}.{method} is gone"
    arguments = node.args
    theirs = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    assert [name for name in theirs if name in ours] == list(ours)


@pytest.mark.compat
@pytest.mark.parametrize("patch", [*_FLAG_PATCHES, *_REQUEST_PATCHES], ids=lambda patch: patch.target)
def test_what_we_wrap_takes_what_we_rely_on(wheel: Wheel, patch: Any) -> None:
    module, _, path = patch.target.partition(":")
    class_name, _, method = path.partition(".")
    node = wheel.find_method(module, class_name, method)
    assert node is not None
    assert set(patch.params) <= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}


@pytest.mark.compat
@pytest.mark.parametrize("module", ATTRIBUTES)
def test_what_we_read_is_there(wheel: Wheel, module: str) -> None:
    sources = {
        "installed": ast.parse(inspect.getsource(importlib.import_module(module))),
        NEWEST: wheel.module(module),
    }
    for version, tree in sources.items():
        named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        named |= {
            node.target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        named |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert set(ATTRIBUTES[module]) <= named, version


@pytest.mark.parametrize("found", ["0.31.2", "0.34.0", "1.0.0"])
def test_another_version_is_refused_in_one_sentence(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    install_flags()
    monkeypatch.setattr(versions, "version", lambda name: found)
    settings = kv_eviction_args("snapkv", 256)
    with pytest.raises(versions.UnsupportedVLLMError) as error:
        EngineArgs(model=str(tiny_llama), skip_tokenizer_init=True, **settings).create_engine_config()
    assert str(error.value) == f"vllm_kvevict supports vLLM {versions.SUPPORTED_VLLM}; found {found}"
    EngineArgs(model=str(tiny_llama), skip_tokenizer_init=True).create_engine_config()
