"""Chunks, async scheduling, preemption, tight memory: engines started with other settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import async_on_cpu, engine
from tests.tiny_llama import random_prompt

BUDGET = 96


@pytest.mark.feature("chunked prefill")
def test_chunk_size_does_not_change_what_is_kept(tiny_llama: Path, kept_masks: list[torch.Tensor]) -> None:
    """333 = 10 * 33 + 3: the last chunk is far shorter than the observation window."""
    prompt = random_prompt(333, seed=7)
    with engine(tiny_llama, budget=BUDGET, enable_prefix_caching=False) as running:
        for chunk in (333, 256, 96, 33):
            running.add(prompt, max_tokens=2)
            with running.in_chunks(chunk):
                for _ in range(-(-333 // chunk)):
                    assert not running.num_evictions
                    running.step()
            assert running.num_evictions == 1
            running.num_evictions = 0
            running.run()
    whole, *cut = kept_masks
    assert len(cut) == 3 and all(mask.equal(whole) for mask in cut)


@pytest.mark.feature("async scheduling")
@pytest.mark.parametrize(
    "caching", [pytest.param(False, marks=pytest.mark.more("the same without a prefix cache")), True]
)
def test_async_scheduling_gives_the_same_answers(tiny_llama: Path, caching: bool) -> None:
    prompts = [random_prompt(length, seed=length) for length in (40, 333, 700, 1200)]
    cases: list[dict[str, Any]] = [{}, {"kv_eviction": "laq"}, {"kv_budget": "auto"}]
    fields = {"calibration": {"snapkv": {"alpha": 10.0, "beta": -74.0}}}
    settings = {"budget": BUDGET, "fields": fields, "enable_prefix_caching": caching}
    with engine(tiny_llama, **settings) as synchronous:
        assert type(synchronous.scheduler).__name__ == "EvictionScheduler"
        expected = [synchronous.tokens(prompts, max_tokens=40, extra_args=case) for case in cases]
    with async_on_cpu(), engine(tiny_llama, async_scheduling=True, **settings) as asynchronous:
        assert type(asynchronous.scheduler).__name__ == "AsyncEvictionScheduler"
        assert [asynchronous.tokens(prompts, max_tokens=40, extra_args=case) for case in cases] == expected
        asynchronous.check_all_free()


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Return a list that grows by the first argument of every call of ``owner.name``."""
    calls: list[Any] = []
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.smoke
@pytest.mark.feature("preemption and resume")
def test_repeated_preemption_ends_well(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 blocks for prompts of 13 blocks each: requests push each other out again and again."""
    prompts = [random_prompt(400, seed=index) for index in range(6)]
    answers = []
    with engine(
        tiny_llama, budget=256, num_gpu_blocks_override=24, max_model_len=640, enable_prefix_caching=False
    ) as tight:
        tight.poison_unowned_memory()
        preemptions = count_calls(monkeypatch, tight.scheduler, "_preempt_request")
        for _ in range(2):
            preemptions.clear()
            answers.append(tight.tokens(prompts, max_tokens=150))
            tight.check_all_free()
            assert len(preemptions) >= 3
    assert all(len(tokens) == 150 for tokens in answers[0])
    assert answers[0] == answers[1]


@pytest.mark.feature("preemption and resume")
@pytest.mark.parametrize("caching", [False, pytest.param(True, marks=pytest.mark.more("the same with a prefix cache"))])
def test_a_preempted_request_keeps_the_answer_that_it_had(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caching: bool
) -> None:
    """It is evicted where its prompt ends, once more, and computes its answer on what is left: nothing has happened."""
    prompts = [random_prompt(390 + index, seed=index) for index in range(3)]
    cases: list[dict[str, Any]] = [{}, {"kv_budget": 0.3}, {"kv_eviction": "laq_deferred"}, {"kv_budget": "auto"}]
    settings = {"num_gpu_blocks_override": 32, "max_model_len": 900, "enable_prefix_caching": caching}
    fields = {"calibration": {"snapkv": {"alpha": 10.0, "beta": -74.0}}}
    with engine(tiny_llama, budget=128, fields=fields, max_num_batched_tokens=300, **settings) as tight:
        tight.poison_unowned_memory()
        preemptions = count_calls(monkeypatch, tight.scheduler, "_preempt_request")
        for case in cases:
            alone = [tight.tokens([prompt], max_tokens=260, extra_args=case)[0] for prompt in prompts]
            preemptions.clear()
            assert tight.tokens(prompts, max_tokens=260, extra_args=case) == alone
            assert any(request.num_output_tokens > 64 for request in preemptions)
            tight.check_all_free()


@pytest.mark.feature("prefix caching")
def test_a_prompt_that_leaves_no_room_for_fresh_blocks_is_compacted_in_place(tiny_llama: Path) -> None:
    """23 blocks: 22 of the prompt and 2 fresh ones are too many. What is rewritten is shared with nobody."""
    prompt = random_prompt(700, seed=1)
    with engine(tiny_llama, budget=BUDGET, num_gpu_blocks_override=24, max_model_len=736) as tight:
        tight.poison_unowned_memory()
        cold, warm = (tight.generate([prompt])[0] for _ in range(2))
        short = [tight.generate([prompt[:600]])[0] for _ in range(2)]
        tight.check_all_free()
    assert warm.num_cached_tokens == (22 - BUDGET // 32) * 32
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids
    # with room for fresh blocks: all but the window that SnapKV looks at
    assert [output.num_cached_tokens for output in short] == [544, 544]
    assert short[0].outputs[0].token_ids == short[1].outputs[0].token_ids


@pytest.mark.more_on_v2("on V1 as many are counted: the scheduler does not know the runner")
def test_more_requests_decode_at_once(tiny_llama: Path) -> None:
    """Memory for 3,000 tokens, 16 prompts of 1,000."""
    prompts = [random_prompt(1000, seed=index) for index in range(16)]
    most = {}
    for policy in (None, "snapkv"):
        with engine(
            tiny_llama, policy, budget=64, num_gpu_blocks_override=96, max_model_len=1200, enable_prefix_caching=False
        ) as tight:
            tight.tokens(prompts, max_tokens=60)
            most[policy] = tight.max_running
    assert most["snapkv"] >= 2.5 * most[None]


def test_a_worker_that_does_not_evict_stops_the_engine(tiny_llama: Path) -> None:
    with engine(tiny_llama, budget=BUDGET) as broken:
        broken.bridge.end_step = dict
        broken.add(random_prompt(300, seed=5))
        with pytest.raises(RuntimeError, match="the worker did not evict as planned"):
            broken.step()


def test_weights_of_another_model_are_refused_at_the_start(tiny_llama: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.json"
    weights.write_text("[1, 2, 3]")
    fields = {"allocator": "fixed", "allocator_options": {"file": str(weights)}}
    message = r"fixed\.file: expected weights of 2 layers of 1 or 2 heads in .*, got \(3,\)"
    with pytest.raises(ValueError, match=message), engine(tiny_llama, budget=BUDGET, fields=fields):
        pass
