"""An engine finds out when it starts, not inside a request, what is wrong with the compiled kernels."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import CpuArchEnum

from tests.engine.harness import engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.kernels import native

# each test starts an engine, in seconds: what is said when one starts is what they are about
pytestmark = pytest.mark.more_on_v2("a worker looks for the kernels before it has a runner")

LIBRARY = "_cpu.so"
INSTALLED = native.PACKAGE / LIBRARY


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, in which the compiled kernels are looked for."""
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    caches = (native.library, native.cuda_library, native.function, native.cuda_function)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def vllms_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What vLLM's handler shows: records of its logger and of loggers below."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def said_of_kernels(log: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    assert "KV eviction is on" in log.text
    return [
        (each.levelname, each.getMessage())
        for each in log.records
        if "_cpu.so" in each.getMessage() or "CPU kernels" in each.getMessage()
    ]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_library_of_other_sources_ends_an_engine_at_its_start(tiny_llama: Path, package: Path) -> None:
    library, source = package / LIBRARY, package / "stale.cpp"
    source.write_text('extern "C" const char* kvevict_interface() { return "0123456789abcdef"; }\n')
    subprocess.run(["c++", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    message = f"{library.name}: expected a library of interface .*, got 0123456789abcdef: .* Build it again with"
    with pytest.raises(RuntimeError, match=message), engine(tiny_llama):
        pytest.fail("the engine has started")


def test_an_engine_without_a_library_says_so_once(
    tiny_llama: Path, package: Path, vllms_log: pytest.LogCaptureFixture
) -> None:
    with engine(tiny_llama) as started:
        ((level, message),) = said_of_kernels(vllms_log)
        assert level == "WARNING"
        assert message.startswith("CPU kernels are not built: using their slower torch references. To build them, ")
        started.tokens([[1] * 200], max_tokens=2)
    assert len(said_of_kernels(vllms_log)) == 1


@pytest.mark.skipif(not INSTALLED.exists(), reason="the kernels are not built")
def test_an_engine_with_a_library_says_nothing(
    tiny_llama: Path, package: Path, vllms_log: pytest.LogCaptureFixture
) -> None:
    shutil.copy(INSTALLED, package)
    with engine(tiny_llama):
        assert not said_of_kernels(vllms_log)


@pytest.mark.feature("CPU on Arm, with the kernels' definitions or built from the sdist, not run on such a machine")
def test_a_machine_that_says_it_is_an_arm_serves_by_the_definitions(
    tiny_llama: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would take its kernel for NEON, whose pages are packed otherwise; ours takes the one for every machine."""
    monkeypatch.setattr(CpuPlatform, "get_cpu_architecture", classmethod(lambda cls: CpuArchEnum.ARM))
    with engine(tiny_llama) as running:
        layers = running.worker.vllm_config.compilation_config.static_forward_context.values()
        assert {layer.isa for layer in layers} == {"vec"}
        running.tokens([random_prompt(400, seed=1)], max_tokens=4)
        assert running.num_evictions == 1 and native.library() is None
        running.check_all_free()
