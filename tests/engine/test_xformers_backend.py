"""What ``--attention-backend CUSTOM`` means, and what is refused there; test_triton_backend.py runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.engine.harness import engine
from vllm_kvevict.engine.worker import cpu_worker
from vllm_kvevict.engine.worker.backends import xformers
from vllm_kvevict.engine.worker.backends.base import backend_in_place_of
from vllm_kvevict.engine.worker.backends.cuda import XFORMERS, cuda_backends
from vllm_kvevict.engine.worker.backends.xformers import EvictionXformersBackend


def test_it_is_what_custom_means_unless_somebody_has_a_backend_of_that_name(tiny_llama: Path) -> None:
    custom = AttentionBackendEnum.CUSTOM
    vllm_config = EngineArgs(str(tiny_llama), skip_tokenizer_init=True).create_engine_config()
    with cuda_backends(vllm_config):
        assert custom.get_path() == XFORMERS
        assert custom.get_class() is EvictionXformersBackend
    assert not custom.is_overridden()
    with backend_in_place_of(custom, "somebody.Else"):
        with cuda_backends(vllm_config):
            assert custom.get_path() == "somebody.Else"
        assert custom.get_path() == "somebody.Else"


@pytest.mark.parametrize(
    ("is_installed", "message"),
    [
        (False, r"CUSTOM: .* is xformers, which is not installed; run `pip install vllm-kvevict\[xformers\]` or use"),
        (True, r"CUSTOM: xformers takes float16 or bfloat16.* got torch.float32, a cache in auto and 32; use --att"),
    ],
)
def test_what_it_cannot_serve_is_refused_at_start_up(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, is_installed: bool, message: str
) -> None:
    monkeypatch.setattr(xformers, "HAS_XFORMERS", is_installed)
    ours = lambda: backend_in_place_of(AttentionBackendEnum.CPU_ATTN, EvictionXformersBackend)  # noqa: E731
    monkeypatch.setattr(cpu_worker, "cpu_backend", ours)
    with pytest.raises(ValueError, match=message), engine(tiny_llama, budget=64):
        pass
