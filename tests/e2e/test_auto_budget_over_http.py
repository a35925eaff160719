"""``calibrate`` as a user runs it, and a server that goes by what it has written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.conftest import ROOT
from tests.e2e.prompts import long_text
from tools.server import Server

ENGINE = ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20))


def calibrate(model: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_kvevict", "calibrate", "--model", str(model), "--out", str(out)]
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET",)}
    return subprocess.run(
        [*command, *flags, *ENGINE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.feature("a budget chosen for each prompt")
def test_calibrate_and_serve(smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    sizes = ("--prompt-tokens", "256", "--prompts", "1", "--kept", "0.3", "0.6")
    run = calibrate(smollm2, file, "--kv-eviction", "knorm", *sizes)
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"wrote {file}: alpha" in run.stdout
    found = json.loads(file.read_text())
    assert found["model"] == str(smollm2)
    assert found["policies"].keys() == {"knorm"}
    assert found["policies"]["knorm"].keys() == {"alpha", "beta"}
    other = calibrate(ROOT, file, "--kv-eviction", "knorm", *sizes)
    assert other.returncode == 2
    assert "--out: expected a calibration of" in other.stderr

    flags = ["--kv-eviction", "knorm", "--kv-budget", "auto", "--kv-budget-calibration", str(file)]
    rest = ["--max-model-len", "2048", "--dtype", "float32", "--enforce-eager", "--served-model-name", "model"]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TRITON_INTERPRET": "0"}
    with Server(smollm2, tmp_path / "server.log", *flags, *rest, env=env) as server:
        client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)

        def ask(**options: Any) -> tuple[int, float]:
            """Return the prompt's tokens, and how many of them were evicted."""
            before = server.metrics()["kvevict:evicted_tokens_total"]
            messages: Any = [{"role": "user", "content": long_text(40)}]
            answer = client.chat.completions.create(
                model="model", messages=messages, max_tokens=8, extra_body={"vllm_xargs": options}
            )
            assert answer.usage is not None
            return answer.usage.prompt_tokens, server.metrics()["kvevict:evicted_tokens_total"] - before

        num_tokens, chosen = ask()
        assert 0 <= chosen <= 0.95 * num_tokens
        bounded = [ask(kv_budget_min=0.8)[1], ask(kv_budget_max=0.2)[1], ask(kv_budget=0.5)[1]]
        assert bounded[0] <= 0.2 * num_tokens
        assert bounded[1] >= 0.8 * num_tokens - 32
        assert 0.5 * num_tokens - 32 <= bounded[2] <= 0.5 * num_tokens + 32  # the last block is filled in part
        with pytest.raises(BadRequestError, match="'auto' needs a calibration of policy 'snapkv'"):
            ask(kv_eviction="snapkv")
        with pytest.raises(BadRequestError, match="kv_budget_max: expected a fraction between 0 and 1, got 3"):
            ask(kv_budget_max=3)
        assert server.is_healthy()
