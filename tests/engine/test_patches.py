"""The ledger of wrapped functions: each exists, and without --kv-eviction only EngineArgs differs."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import replace
from textwrap import dedent

import pytest

from vllm_kvevict.engine.frontend.install import _FLAG_PATCHES, _REQUEST_PATCHES
from vllm_kvevict.engine.frontend.patches import Patch, apply_patches, find
from vllm_kvevict.engine.versions import SUPPORTED_VLLM, UnsupportedVLLMError

ALL = [*_FLAG_PATCHES, *_REQUEST_PATCHES]


class Victim:
    def method(self, number: int) -> int:
        return number

    @classmethod
    def maker(cls, number: int) -> int:
        return number


def plus_one(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args) + 1

    return wrapper


PATCH = Patch(f"{__name__}:Victim.method", plus_one, ("number",), "a test", "never")


@pytest.mark.compat
@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.target)
def test_targets_exist_and_take_what_we_rely_on(patch: Patch) -> None:
    owner, name, _ = find(patch)
    assert hasattr(owner, name)
    assert patch.why and patch.remove_when


def test_there_are_at_most_nine() -> None:
    assert len(ALL) <= 9


def test_a_patch_applies_once_and_keeps_its_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Victim, "method", Victim.method)
    monkeypatch.setattr(Victim, "maker", Victim.__dict__["maker"])
    maker = replace(PATCH, target=f"{__name__}:Victim.maker")
    for _ in range(2):
        apply_patches([PATCH, maker])
    assert Victim().method(1) == 2
    assert Victim.maker(1) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"target": "vllm.nowhere:Class.method"},
        {"target": f"{__name__}:Victim.gone"},
        {"target": f"{__name__}:Victim.method", "params": ("lost",)},
    ],
)
def test_nothing_changes_when_a_target_is_missing(change: dict) -> None:
    before = Victim.method
    with pytest.raises(UnsupportedVLLMError):
        apply_patches([PATCH, replace(PATCH, **change)])
    assert Victim.method is before


def test_supported_versions() -> None:
    assert SUPPORTED_VLLM.contains("0.32.0+cpu") and SUPPORTED_VLLM.contains("0.33.1")
    assert not SUPPORTED_VLLM.contains("0.31.2") and not SUPPORTED_VLLM.contains("0.34.0")


def test_eviction_off_changes_nothing_but_engine_args() -> None:
    """Every attribute of every loaded vLLM module and class, before and after the plugin is loaded."""
    script = dedent(
        """
        import sys
        import vllm, vllm.v1.engine.core, vllm.v1.worker.cpu_worker, vllm.v1.metrics.loggers
        import vllm.entrypoints.openai.api_server
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins

        def snapshot():
            seen = {}
            for module_name, module in list(sys.modules.items()):
                if not module_name.startswith("vllm.") or module is None:
                    continue
                for name, value in list(vars(module).items()):
                    seen[module_name, name] = value
                    if isinstance(value, type) and value.__module__ == module_name:
                        seen.update({(module_name, name, k): v for k, v in list(vars(value).items())})
            return seen

        before = snapshot()
        load_general_plugins()
        after = snapshot()
        changed = {key for key in before if after.get(key) is not before[key]}
        mine = {key for key in changed if "plugins_loaded" not in key}
        print(sorted(key[-2:] for key in mine))
        """
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    expected = [("EngineArgs", name) for name in ("add_cli_args", "create_engine_config", "from_cli_args")]
    assert printed.splitlines()[-1] == str(expected)
