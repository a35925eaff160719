"""Every policy with every kind of allocator, request by request, on one real server with a real model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

from tests.e2e.prompts import long_text
from tools.server import Server
from vllm_kvevict.policies import POLICIES

ALLOCATORS = ("uniform", "adakv", "lava")
CASES = list(product(POLICIES.names(), ALLOCATORS))


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = ["--kv-eviction", "snapkv", "--kv-budget", "192", "--max-model-len", "2048", "--max-num-seqs", "16"]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TRITON_INTERPRET": "0"}
    # without bfloat16 in its instructions a CPU is four times faster in float32
    rest = ["--dtype", "float32", "--enforce-eager", "--served-model-name", "model"]
    with Server(smollm2, log, *flags, *rest, env=env) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)


def evictions_by_label(server: Server) -> dict[tuple[str, str], float]:
    samples = [sample for sample in server.samples() if sample.name == "kvevict:evictions_total"]
    return {(sample.labels["policy"], sample.labels["allocator"]): sample.value for sample in samples}


@pytest.mark.feature("requests that choose their own policy, budget and allocator")
def test_every_policy_with_every_allocator(server: Server, client: OpenAI) -> None:
    def ask(index: int) -> str:
        policy, allocator = CASES[index]
        # texts of their own: the first sentences differ, so that no prefix is shared
        text = f"Letter number {index}. " + long_text(28 + index % 5)
        options = {"kv_eviction": policy, "kv_budget_allocator": allocator}
        answer = client.chat.completions.create(
            model="model",
            messages=[{"role": "user", "content": text}],
            max_tokens=10,  # some policies look at the answer
            temperature=0,
            extra_body={"vllm_xargs": options, "ignore_eos": True},
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 10
        return answer.choices[0].message.content or ""

    before = evictions_by_label(server)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(len(CASES))))
    after = evictions_by_label(server)
    assert all(answers)
    assert {case: after.get(case, 0) - before.get(case, 0) for case in CASES} == dict.fromkeys(CASES, 1)
    assert server.is_healthy()


def test_a_budget_below_the_protection_of_another_policy_is_a_400(server: Server, client: OpenAI) -> None:
    widest = max(POLICIES.names(), key=lambda name: POLICIES.get(name)().num_recent)
    with pytest.raises(BadRequestError, match="kv_budget: expected at least"):
        options = {"kv_eviction": widest, "kv_budget": 32}
        client.completions.create(model="model", prompt="hello", max_tokens=2, extra_body={"vllm_xargs": options})
    assert server.is_healthy()
