"""Every policy, with one kind of allocator or another, request by request, on one real server with a real model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import pytest
from openai import BadRequestError, OpenAI

from tests.e2e.conftest import evictions_by_policy
from tests.e2e.prompts import long_text
from tools.server import Server
from vllm_kvevict.policies import POLICIES

# every policy with every allocator in one batch: tests/engine/test_policies.py
CASES = list(zip(POLICIES.names(), cycle(("uniform", "adakv", "lava")), strict=False))


@pytest.mark.more("engine/test_policies.py evicts by each of them, e2e/test_http.py by some over HTTP")
@pytest.mark.feature("requests that choose their own policy, budget and allocator")
def test_every_policy_with_some_allocator(server: Server, client: OpenAI) -> None:
    def ask(index: int) -> str:
        policy, allocator = CASES[index]
        # texts of their own: the first sentences differ, so that no prefix is shared
        text = f"Letter number {index}. " + long_text(28 + index % 5)
        options = {"kv_eviction": policy, "kv_budget_allocator": allocator, "kv_budget": 192}
        answer = client.chat.completions.create(
            model="model",
            messages=[{"role": "user", "content": text}],
            max_tokens=10,  # some policies look at the answer
            temperature=0,
            extra_body={"vllm_xargs": options, "ignore_eos": True},
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 10
        return answer.choices[0].message.content or ""

    before = evictions_by_policy(server)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(len(CASES))))
    assert all(answers)
    assert evictions_by_policy(server) - before == dict.fromkeys(CASES, 1)
    assert server.is_healthy()


def test_a_budget_below_the_protection_of_another_policy_is_a_400(server: Server, client: OpenAI) -> None:
    widest = max(POLICIES.names(), key=lambda name: POLICIES.get(name)().num_recent)
    with pytest.raises(BadRequestError, match="kv_budget: expected at least"):
        options = {"kv_eviction": widest, "kv_budget": 32}
        client.completions.create(model="model", prompt="hello", max_tokens=2, extra_body={"vllm_xargs": options})
    assert server.is_healthy()
