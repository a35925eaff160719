"""What tests of the server share: one of them, with SnapKV, the example of a third-party policy and a calibration."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.conftest import ROOT
from tools.server import Server

BUDGET = 256
CALIBRATED = {"snapkv": {"alpha": 1.0, "beta": -9.0}}
# engines in processes of their own; without bfloat16 in its instructions a CPU is four times faster in float32
ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TRITON_INTERPRET": "0"}
ENGINE = ("--enforce-eager", "--served-model-name", "model", "--dtype", "float32")


@pytest.fixture(scope="session")
def example_policy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the example; a copy is built, since setuptools writes beside it."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(ROOT / "examples" / "third_party_policy", folder / "source")
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    paths = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="session")
def server(smollm2: Path, example_policy: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    calibration = folder / "calibration.json"
    calibration.write_text(json.dumps({"model": str(smollm2), "policies": CALIBRATED}))
    flags = ["--kv-eviction", "snapkv", "--kv-budget", str(BUDGET), "--kv-eviction-log-requests"]
    flags += ["--kv-budget-calibration", str(calibration), "--max-model-len", "8192", "--max-num-seqs", "16"]
    flags += ["--kv-evict-max-num-seqs", "16"]
    flags += ["--kv-request-options", '{"policies": ["all", "none"]}']
    with Server(smollm2, folder / "server.log", *flags, *ENGINE, env={**ENV, **example_policy}) as started:
        yield started


@pytest.fixture(scope="session")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)


def evictions_by_policy(server: Server) -> Counter[tuple[str, str]]:
    """Prompts evicted so far by each pair of a policy and an allocator."""
    samples = [sample for sample in server.samples() if sample.name == "kvevict:evictions_total"]
    return Counter({(sample.labels["policy"], sample.labels["allocator"]): int(sample.value) for sample in samples})
