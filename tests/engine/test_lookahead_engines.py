"""Lookahead Q-Cache where it needs engines of its own: a cache that is too small, and a real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import USES_V2_RUNNER
from tests.engine.dense_lookahead import LookaheadModel, check_kept
from tests.engine.harness import engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.offline.tasks import make_example
from vllm_kvevict.eviction.record import recorded_evictions

pytestmark = pytest.mark.on_v1

TASKS = ("needle_noise", "needle_prose", "passkey", "key_value", "copying")


@pytest.mark.more_on_v2("on V1 requests that look ahead are preempted, too")
def test_preemption(tiny_llama: Path) -> None:
    """A preempted request looks ahead again, behind its prompt and what it has said so far."""
    prompts = [random_prompt(300 + 30 * index, seed=index) for index in range(6)]
    with engine(tiny_llama, "laq", 128, kv_cache_memory_bytes=1 << 20, max_model_len=768) as running:
        running.poison_unowned_memory()
        outputs = running.generate(prompts, max_tokens=200)
        assert running.num_evictions > len(prompts)
        assert all(len(output.outputs[0].token_ids) == 200 for output in outputs)
        running.check_all_free()


@pytest.mark.skipif(USES_V2_RUNNER, reason="Triton's interpreter takes minutes for such prompts")
def test_a_real_model_keeps_what_the_offline_lookahead_keeps(smollm2: Path) -> None:
    """Prompts of the quality tasks, some of whose pseudo tokens end the answer."""
    prompts = [make_example(smollm2, task, 220, 0).prompt for task in TASKS]
    settings = {"max_model_len": 512, "kv_cache_memory_bytes": 256 << 20}
    with engine(smollm2, "laq", 96, **settings) as running, recorded_evictions() as records:
        for prompt in prompts:
            for policy in ("laq", "laq++"):
                running.tokens([prompt], max_tokens=2, extra_args={"kv_eviction": policy})
    offline = LookaheadModel(smollm2, end_tokens=(2,))
    counts = set()
    for prompt, laq, plus in zip(prompts, records[::2], records[1::2], strict=True):
        expected = offline.run(prompt, laq.plan.num_kept_tokens)
        counts.add(len(expected.tokens))
        check_kept(expected.scores(window=0), laq.kept)
        check_kept(expected.scores(window=8), plus.kept)
    assert len(counts) > 1, "no pseudo token ended its answer"
