"""Draft models: what they cached of a prompt is evicted too, and no answer changes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tests.conftest import USES_V2_RUNNER
from tests.engine.harness import Engine, engine
from tests.engine.test_speculation import counted_drafts
from tests.tiny_llama import random_prompt, tiny_llama_config
from vllm_kvevict.eviction.observer import Choice, EvictionObserver, observed_by
from vllm_kvevict.policies.streaming_llm import StreamingLLM

BUDGET = 96
PROMPTS = [random_prompt(length, seed=length) for length in (40, 383, 450, 512, 700)]
NUM_EVICTED = 4
NUM_DRAFTS = 4
MAX_TOKENS = 30 if USES_V2_RUNNER else 60


def speculation(draft: Path) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(draft), "num_speculative_tokens": NUM_DRAFTS}


def answers(running: Engine, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[list[int]]:
    return running.tokens(prompts, max_tokens=MAX_TOKENS, extra_args=options)


def check_drafts(counts: list[tuple[int, int]]) -> None:
    """Every draft is right but those of a prefill's last step, which were made before the eviction."""
    drafted, accepted = sum(count for count, _ in counts), sum(count for _, count in counts)
    assert drafted - accepted <= NUM_EVICTED * NUM_DRAFTS
    assert accepted > 100


class Policies(EvictionObserver):
    """Notes by what the target and the draft were evicted."""

    def __init__(self) -> None:
        self.seen: list[type] = []

    def chosen(self, choice: Choice) -> None:
        self.seen.append(type(choice.method.policy))


@pytest.fixture(scope="module")
def llama_with_four_heads(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama again, with each of its two KV heads twice."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    weights = {
        name: weight.unflatten(0, (2, 32)).repeat_interleave(2, dim=0).flatten(0, 1)
        if "k_proj" in name or "v_proj" in name
        else weight
        for name, weight in model.state_dict().items()
    }
    twice = LlamaForCausalLM(tiny_llama_config(num_key_value_heads=4)).float()
    twice.load_state_dict(weights)
    folder = tmp_path_factory.mktemp("llama_with_four_heads")
    twice.save_pretrained(folder)
    return folder


@pytest.mark.feature("speculative decoding by a draft model")
def test_a_draft_that_keeps_what_its_target_keeps_is_right(tiny_llama: Path) -> None:
    """The draft is the model itself, and prompts come in chunks."""
    cases = [
        {"kv_budget_allocator": "uniform"},
        {"kv_budget_allocator": "lava"},
        {"kv_eviction": "h2o"},
        {"kv_eviction": "curdkv"},
    ]
    with engine(tiny_llama, budget=BUDGET) as running:
        plain = [answers(running, **case) for case in cases]
    settings = {"speculative_config": speculation(tiny_llama), "max_num_batched_tokens": 256}
    with engine(tiny_llama, budget=BUDGET, **settings) as running:
        running.poison_unowned_memory()
        counts = counted_drafts(running)
        for case, expected in zip(cases, plain, strict=True):
            counts.clear()
            assert answers(running, **case) == expected
            check_drafts(counts)
        assert running.num_evictions == NUM_EVICTED * len(cases)
        # vLLM pads a step of one token with drafts, and the prefix cache may leave no more of this prompt
        once, again = (
            running.tokens([random_prompt(10 * 32 + 1, seed=1)], max_tokens=6, extra_args={"kv_eviction": "knorm"})
            for _ in range(2)
        )
        assert once == again
        running.check_all_free()


@pytest.mark.smoke
def test_a_draft_may_have_other_heads(tiny_llama: Path, llama_with_four_heads: Path) -> None:
    """Scored by position, both models keep the same tokens."""
    with engine(tiny_llama, policy="streaming_llm", budget=BUDGET) as running:
        plain = answers(running)
    settings = {"speculative_config": speculation(llama_with_four_heads)}
    with engine(tiny_llama, policy="streaming_llm", budget=BUDGET, **settings) as running:
        running.poison_unowned_memory()
        counts = counted_drafts(running)
        assert answers(running) == plain
        check_drafts(counts)
        assert running.num_evictions == NUM_EVICTED
        running.check_all_free()


@pytest.mark.more_on_v2("no draft sits out on V2")
def test_a_draft_that_sat_out_keeps_its_last_tokens(tiny_llama: Path) -> None:
    """Model runner V1 proposes nothing in a step in which one of the requests is about to reach the longest length."""
    prompts = [random_prompt(700, seed=1), random_prompt(450, seed=2)]
    settings = {"max_model_len": 703}
    with engine(tiny_llama, budget=BUDGET, **settings) as running:
        plain = answers(running, prompts)
    with engine(tiny_llama, budget=BUDGET, speculative_config=speculation(tiny_llama), **settings) as running:
        running.poison_unowned_memory()
        observer = Policies()
        with observed_by(observer):
            assert answers(running, prompts) == plain
        assert observer.seen.count(StreamingLLM) == (0 if USES_V2_RUNNER else 2)
        assert running.num_evictions == 2
        running.check_all_free()
