"""Random requests over a tree of prefixes, in little memory, some aborted: every answer is that of a fresh engine.

KVEVICT_STRESS_REQUESTS, an environment variable: how many requests; if it is not set 60, or 50 in the interpreter.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import USES_V2_RUNNER
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt

pytestmark = pytest.mark.on_v1

NUM_REQUESTS = int(os.environ.get("KVEVICT_STRESS_REQUESTS", 50 if USES_V2_RUNNER else 60))
MODELS = [
    ("tiny_llama", 1),
    pytest.param("tiny_gemma", 0, marks=pytest.mark.more("on V1 there are sinks beside sliding windows")),
]
if not USES_V2_RUNNER:
    MODELS += [("tiny_gpt_oss", 0)]
MAX_PROMPT = 1028
OPTIONS: list[dict[str, Any] | None] = [
    None,
    {"kv_eviction": "none"},
    {"kv_budget": 64},
    {"kv_budget": 200},
    {"kv_budget": 0.3},
    {"kv_eviction": "lava", "kv_budget": 128},
    {"kv_eviction": "h2o", "kv_budget": 128},
    {"kv_eviction": "keydiff", "kv_budget": 0.5},
    {"kv_eviction": "streaming_llm", "kv_budget": 64},
    {"kv_budget_allocator": "adakv", "kv_budget": 96},
    {"kv_evict_during_decode": 1},
    {"kv_evict_during_decode": "true", "kv_eviction": "h2o", "kv_budget": 128},
    {"kv_evict_during_decode": 1, "kv_eviction": "lava", "kv_budget": 0.4},
    {"kv_evict_during_decode": 1, "kv_eviction": "streaming_llm", "kv_budget": 70},
    {"kv_evict_during_decode": 1, "kv_evict_interval": 1, "kv_eviction": "morphkv", "kv_budget": 128},
    {"kv_evict_during_decode": 1, "kv_evict_interval": 1, "kv_eviction": "h2o", "kv_budget_allocator": "lava"},
    {"kv_evict_during_decode": 1, "kv_evict_interval": 1, "kv_eviction": "streaming_llm", "kv_budget": 0.3},
    {"kv_evict_during_decode": 1, "kv_evict_interval": 1, "kv_evict_during_prefill": 1, "kv_eviction": "tova"},
    {"kv_evict_during_prefill": 1},
    {"kv_evict_during_prefill": 1, "kv_evict_during_decode": 1, "kv_eviction": "lava", "kv_budget": 128},
    {"kv_budget": "auto"},
    {"kv_budget": "auto", "kv_budget_max": 0.4},
]
# not with sliding windows
LOOKAHEAD = [{"kv_eviction": "laq"}, {"kv_eviction": "laq++", "kv_budget": 0.4}]
SETTINGS: dict[str, Any] = {
    "budget": 96,
    "max_model_len": 1152,
    "max_num_batched_tokens": 300,
    "fields": {"calibration": {"snapkv": {"alpha": 10.0, "beta": -74.0}}},
}
NUM_BLOCKS, MAX_REQUESTS = 40, 8  # one request of the longest takes 36 blocks, with sliding windows some more


@dataclass
class Served:
    """A request, and its answer once it has ended."""

    prompt: list[int]
    params: dict[str, Any]
    answer: list[int] | None = None
    was_preempted: bool = False

    @property
    def depends_on_the_batch(self) -> bool:
        """Whether it is evicted where chunks end, which others in its batch decide on."""
        return "kv_evict_during_prefill" in (self.params["extra_args"] or {})

    @property
    def is_comparable(self) -> bool:
        """Whether it ran to its end and was evicted where a request that runs alone is: if its answer is evicted, too,
        that is so until it is preempted, and with other ones always.
        """
        evicts_answer = "kv_evict_during_decode" in (self.params["extra_args"] or {})
        if self.depends_on_the_batch or (self.was_preempted and evicts_answer):
            return False
        return self.answer is not None and len(self.answer) == self.params["max_tokens"]


def random_request(rng: random.Random, served: dict[str, Served], options: list[dict[str, Any] | None]) -> Served:
    """A prompt that shares its first pieces with others, or goes on after an answer, as a chat does."""
    prompt: list[int] = []
    ended = [request for request in served.values() if request.answer is not None]
    if ended and rng.random() < 0.3:
        previous = rng.choice(ended)
        prompt = previous.prompt + (previous.answer or [])
    for depth in range(rng.randint(1, 4)):
        prompt = prompt + random_prompt(rng.choice([20, 64, 130, 257]), seed=100 * depth + rng.randint(0, 1))
    return Served(prompt[:MAX_PROMPT], {"max_tokens": rng.randint(1, 120), "extra_args": rng.choice(options)})


def run_at_random(
    running: Engine, rng: random.Random, count: int, options: list[dict[str, Any] | None]
) -> dict[str, Served]:
    """Queue ``count`` requests over time and abort some. In the middle everything that runs must start again."""
    served: dict[str, Served] = {}
    was_reset = False
    while len(served) < count or running.llm.llm_engine.has_unfinished_requests():
        if len(served) < count and rng.random() < 0.4:
            request = random_request(rng, served, options)
            served[running.add(request.prompt, **request.params)] = request
        waiting = [name for name, request in served.items() if request.answer is None]
        if waiting and rng.random() < 0.03:
            running.llm.llm_engine.abort_request([rng.choice(waiting)])
        if len(served) > count // 2 and len(running.scheduler.running) > 1 and not was_reset:
            was_reset = running.llm.reset_prefix_cache(reset_running_requests=True)
        for output in running.step():
            if output.finished:
                served[output.request_id].answer = list(output.outputs[0].token_ids)
        for request in running.scheduler.requests.values():
            if request.num_preemptions:
                # vLLM's own ids are the given ones with a suffix
                served[request.request_id.rpartition("-")[0]].was_preempted = True
    return served


@pytest.mark.feature("prefix caching")
@pytest.mark.feature("preemption and resume")
@pytest.mark.feature("requests that choose their own policy, budget and allocator")
@pytest.mark.feature("eviction while the answer grows")
@pytest.mark.parametrize(("model", "seed"), MODELS)
def test_every_answer_is_that_of_a_fresh_engine(request: pytest.FixtureRequest, model: str, seed: int) -> None:
    folder = request.getfixturevalue(model)
    blocks = NUM_BLOCKS if model == "tiny_llama" else 2 * NUM_BLOCKS
    options = OPTIONS + LOOKAHEAD if model == "tiny_llama" else OPTIONS
    with engine(folder, num_gpu_blocks_override=blocks, max_num_seqs=MAX_REQUESTS, **SETTINGS) as running:
        comparable = served_at_random(running, seed, options)
    with engine(folder, enable_prefix_caching=False, **SETTINGS) as fresh:
        check_answers(fresh, comparable)


def served_at_random(running: Engine, seed: int, options: list[dict[str, Any] | None]) -> list[Served]:
    """Return the requests of a random sequence that can be compared with what they are alone."""
    running.poison_unowned_memory()
    served = run_at_random(running, random.Random(seed), NUM_REQUESTS, options)
    running.check_all_free()
    comparable = [one for one in served.values() if one.is_comparable]
    assert len(comparable) >= NUM_REQUESTS // 2
    assert running.num_evictions >= NUM_REQUESTS // 2
    assert any(one.was_preempted for one in served.values())
    return comparable


def check_answers(fresh: Engine, comparable: list[Served]) -> None:
    for one in comparable:
        assert fresh.tokens([one.prompt], **one.params) == [one.answer], (len(one.prompt), one.params)


@pytest.mark.skipif(not USES_V2_RUNNER, reason="full graphs are those of model runner V2")
@pytest.mark.more("test_graph_kernels.py has some requests in graphs, and others run at random without")
@pytest.mark.feature("full CUDA graphs of decode steps, not run on a GPU", runners=("V2",))
def test_every_answer_through_graphs_is_that_of_a_fresh_engine_without(tiny_llama: Path) -> None:
    """FlashAttention's, for whose kernels functions stand in that are faster than Triton's interpreter."""
    from tests.engine.graph_engines import flash_engine, num_replays

    options = OPTIONS + LOOKAHEAD
    room = {"max_num_seqs": MAX_REQUESTS, "kv_cache_memory_bytes": 64 << 20}
    start = partial(flash_engine, tiny_llama, version=3, policy="snapkv", **SETTINGS, **room)
    with start(sizes=[2, MAX_REQUESTS], num_gpu_blocks_override=NUM_BLOCKS) as running:
        comparable = served_at_random(running, 1, options)
        assert num_replays(running)["folded"] > NUM_REQUESTS
    with start(sizes=[], enable_prefix_caching=False) as fresh:
        check_answers(fresh, comparable)
