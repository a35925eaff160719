"""The example of a third-party policy: installed by pip, named to a real server, counted by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from prometheus_client.samples import Sample

from tests.conftest import ROOT
from tests.e2e.conftest import BUDGET, ENGINE, ENV
from tests.e2e.prompts import long_text
from tools.server import Server

NAME = "fading_norm"


def test_it_is_listed_with_its_options(example_policy: dict[str, str]) -> None:
    command = [sys.executable, "-m", "vllm_kvevict", "policies"]
    environment = {**os.environ, **example_policy}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{NAME} ")]
    assert "half_life (1024.0)" in line and "4 first" in line and "an example" in line


def samples_of(server: Server) -> dict[str, Sample]:
    """Those of evictions by the example."""
    return {sample.name: sample for sample in server.samples() if sample.labels.get("policy") == NAME}


def check(samples: dict[str, Sample], answer: ChatCompletion, budget: int) -> None:
    assert answer.usage is not None and answer.usage.prompt_tokens > max(200, budget)
    assert answer.choices[0].message.content
    evictions = samples["kvevict:evictions_total"]
    assert evictions.value == 1 and evictions.labels == {"policy": NAME, "allocator": "uniform"}
    assert samples["kvevict:evicted_tokens_total"].value > answer.usage.prompt_tokens - budget - 1


def test_a_request_is_evicted_with_it(server: Server, client: OpenAI) -> None:
    before = samples_of(server)
    answer = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": long_text(30)}],
        max_tokens=8,
        temperature=0,
        extra_body={"vllm_xargs": {"kv_eviction": NAME}},
    )
    check(samples_of(server), answer, BUDGET)
    assert not before


@pytest.mark.more("a server of its own: requests to the server of all tests choose the example as well")
def test_a_server_evicts_with_it(example_policy: dict[str, str], smollm2: Path, tmp_path: Path) -> None:
    options = '{"policy_options": {"half_life": 200}}'
    flags = ["--kv-eviction", NAME, "--kv-budget", "96", "--kv-eviction-config", options]
    sizes = ["--max-model-len", "1024", "--max-num-seqs", "2"]
    with Server(smollm2, tmp_path / "log", *flags, *sizes, *ENGINE, env={**ENV, **example_policy}) as server:
        client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": long_text(20)}], max_tokens=8, temperature=0
        )
        samples = samples_of(server)
    check(samples, answer, 96)
    assert "FadingNorm(half_life=200)" in (tmp_path / "log").read_text()
