"""Settings every test shares. Engines run in the test's process; model runner V2 runs through Triton's interpreter."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# pytest-xdist's processes share the cores: two OpenMP teams on the same ones wait for each other at every barrier.
# A worker inherits what the first process has chosen for itself
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if (
    PROCESSES > 1 or "OMP_NUM_THREADS" not in os.environ
):  # a worker inherits what the first process has chosen for itself
    os.environ["OMP_NUM_THREADS"] = str(max(min((os.cpu_count() or 1) // PROCESSES, 2), 1))
# the benchmarks, which some tests import, ask for less; servers that tests start inherit it
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
USES_V2_RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"

if USES_V2_RUNNER:  # on PYTHONPATH as well, so that every process that a test starts finds the Triton backend
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parent / "triton_interpreter"))
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], *filter(None, [os.environ.get("PYTHONPATH")])])

import pytest
import torch

# the Makefile says which vLLM it means: tests of the newest that ran on the oldest would pass
VLLM = version("vllm")
if os.environ.get("KVEVICT_VLLM", VLLM) != VLLM:
    pytest.exit(f"KVEVICT_VLLM: expected vLLM {os.environ['KVEVICT_VLLM']} first on PYTHONPATH, got {VLLM}", 2)

if not torch.cuda.is_available():  # our own Triton kernels run in the interpreter; read when they are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_llama import build_tiny_llama

    return build_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_gemma import build_tiny_gemma

    return build_tiny_gemma(tmp_path_factory.mktemp("tiny_gemma"))


@pytest.fixture(scope="session")
def tiny_gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tools.matrix.families import family_named

    folder = tmp_path_factory.mktemp("tiny_gpt_oss")
    family_named("gpt-oss").build(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    from tools.build_model import SMOLLM2, build_model

    return build_model(SMOLLM2, Path(os.environ.get("KVEVICT_MODEL", SMOLLM2.default_folder)))


@pytest.fixture(scope="session")
def gemma3() -> Path:
    from tools.build_model import GEMMA3, build_model

    return build_model(GEMMA3)


@pytest.fixture
def kept_masks() -> Iterator[list[torch.Tensor]]:
    """Collects what every eviction kept, [num_layers, num_kv_heads, num_tokens] bool, in order."""
    from vllm_kvevict.eviction.observer import Choice, EvictionObserver, observed_by

    masks: list[torch.Tensor] = []

    class Masks(EvictionObserver):
        def chosen(self, choice: Choice) -> None:
            masks.append(choice.kept)

    with observed_by(Masks()):
        yield masks


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of several, how a BLAS shares out the rows of a product depends on how many there are."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
