"""Random requests over a tree of prefixes, in little memory, some aborted: every answer is the one given alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt

BUDGETS: list[dict[str, Any] | None] = [
    None,
    {"kv_eviction": "none"},
    {"kv_budget": 64},
    {"kv_budget": 200},
    {"kv_budget": 0.3},
    {"kv_eviction": "lava", "kv_budget": 128},
    {"kv_budget_allocator": "adakv", "kv_budget": 96},
]


def random_request(rng: random.Random) -> tuple[list[int], dict[str, Any]]:
    """A prompt that shares its first pieces with others, and how to serve it."""
    prompt: list[int] = []
    for depth in range(rng.randint(1, 4)):
        prompt += random_prompt(rng.choice([20, 64, 130, 257]), seed=100 * depth + rng.randint(0, 1))
    return prompt, {"max_tokens": rng.randint(1, 50), "extra_args": rng.choice(BUDGETS)}


def run_at_random(running: Engine, rng: random.Random, count: int) -> tuple[dict[str, Any], set[str]]:
    """Queue ``count`` requests over time, abort some; return the requests and the ids that were preempted."""
    requests: dict[str, Any] = {}
    preempted: set[str] = set()
    answers: dict[str, list[int]] = {}
    while len(requests) < count or running.llm.llm_engine.has_unfinished_requests():
        if len(requests) < count and rng.random() < 0.4:
            prompt, params = random_request(rng)
            requests[running.add(prompt, **params)] = (prompt, params)
        if rng.random() < 0.03 and len(requests) > len(answers):
            running.llm.llm_engine.abort_request([rng.choice([name for name in requests if name not in answers])])
        for output in running.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)
        live = running.scheduler.requests.values()
        preempted |= {request.request_id for request in live if request.num_preemptions}
    external = {name for name in requests for internal in preempted if internal.startswith(f"{name}-")}
    return {name: (*requests[name], answers.get(name)) for name in requests}, external | preempted


@pytest.mark.parametrize("seed", [0, 1])
def test_every_answer_is_the_one_given_alone(tiny_llama: Path, seed: int) -> None:
    rng = random.Random(seed)
    with engine(
        tiny_llama,
        budget=96,
        num_gpu_blocks_override=72,
        max_model_len=1152,
        max_num_seqs=8,
        max_num_batched_tokens=300,
    ) as running:
        running.poison_unowned_memory()
        served, preempted = run_at_random(running, rng, count=60)
        running.check_all_free()
        compared = 0
        for name, (prompt, params, answer) in served.items():
            if answer is None or len(answer) < params["max_tokens"] or name in preempted:
                continue
            (alone,) = running.tokens([prompt], **params, skip_reading_prefix_cache=True)
            assert answer == alone, (name, len(prompt), params)
            compared += 1
        assert compared >= 30
        assert running.num_evictions >= 30
