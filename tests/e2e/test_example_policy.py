"""The example of a third-party policy: installed by pip, named to a real server, counted by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI

from tests.conftest import ROOT, USES_V2_RUNNER
from tests.e2e.prompts import long_text
from tools.server import Server

pytestmark = pytest.mark.skipif(
    USES_V2_RUNNER, reason="the V2 runner needs Triton's interpreter on a CPU, which a plain subprocess lacks"
)
ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TRITON_INTERPRET": "0"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the example; a copy is built, since setuptools writes beside it."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(ROOT / "examples" / "third_party_policy", folder / "source")
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    paths = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def test_it_is_listed_with_its_options(installed: dict[str, str]) -> None:
    command = [sys.executable, "-m", "vllm_kvevict", "policies"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **installed}, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("fading_norm ")]
    assert "half_life (1024.0)" in line and "4 first" in line and "an example" in line


def test_a_server_evicts_with_it(installed: dict[str, str], smollm2: Path, tmp_path: Path) -> None:
    options = '{"policy_options": {"half_life": 200}}'
    flags = ["--kv-eviction", "fading_norm", "--kv-budget", "96", "--kv-eviction-config", options]
    sizes = ["--max-model-len", "1024", "--max-num-seqs", "2", "--enforce-eager", "--served-model-name", "model"]
    sizes += ["--dtype", "float32"]
    with Server(smollm2, tmp_path / "log", *flags, *sizes, env={**ENV, **installed}) as server:
        client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": long_text(20)}], max_tokens=8, temperature=0
        )
        samples = {sample.name: sample for sample in server.samples() if sample.name.startswith("kvevict:")}
    assert answer.usage is not None and answer.usage.prompt_tokens > 200
    assert answer.choices[0].message.content
    evictions = samples["kvevict:evictions_total"]
    assert evictions.value == 1 and evictions.labels == {"policy": "fading_norm", "allocator": "uniform"}
    assert samples["kvevict:evicted_tokens_total"].value > answer.usage.prompt_tokens - 97
    assert "FadingNorm(half_life=200)" in (tmp_path / "log").read_text()
