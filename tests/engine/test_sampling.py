"""Sampling parameters with eviction on: several samples of one prompt, seeds, logprobs of the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.sampling_params import RequestOutputKind

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt

PROMPT = random_prompt(610, seed=1)
WHOLE = {"kv_eviction": "none"}


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    # in one chunk: vLLM's V1 runner on CPU ends with an error when a prompt with a seed takes several
    with engine(tiny_llama, budget=96) as started:
        started.poison_unowned_memory()
        yield started


@pytest.mark.feature("n > 1")
def test_samples_of_one_prompt_own_their_kept_blocks(running: Engine) -> None:
    """Sample i of n is what a request with the seed of sample i answers; no page has two owners in any step."""
    sampled = {"temperature": 1.0, "max_tokens": 40}
    alone = [running.tokens([PROMPT], seed=7 + index, **sampled)[0] for index in range(3)]
    evictions = running.num_evictions
    (output,) = running.generate([PROMPT], n=3, seed=7, output_kind=RequestOutputKind.FINAL_ONLY, **sampled)
    assert running.num_evictions == evictions + 3
    assert [list(sample.token_ids) for sample in output.outputs] == alone
    assert alone[0] != alone[1]
    running.check_all_free()


@pytest.mark.feature("prompt logprobs")
def test_logprobs_of_the_prompt_come_from_its_full_cache(running: Engine) -> None:
    expected, logged = running.generate([PROMPT], prompt_logprobs=0, extra_args=WHOLE)[0], []
    for _ in range(2):
        (output,) = running.generate([PROMPT], prompt_logprobs=0)
        logged.append(output)
    (plain,) = running.tokens([PROMPT])
    for output in logged:
        assert list(output.outputs[0].token_ids) == plain
        for step, expected_step, token in zip(
            output.prompt_logprobs[1:], expected.prompt_logprobs[1:], PROMPT[1:], strict=True
        ):
            assert step[token].logprob == pytest.approx(expected_step[token].logprob, abs=1e-4)


@pytest.mark.feature("logprobs")
def test_logprobs_of_the_answer(running: Engine) -> None:
    (output,) = running.generate([PROMPT], logprobs=3)
    (whole,) = running.generate([PROMPT], logprobs=3, extra_args=WHOLE)
    assert [len(step) for step in output.outputs[0].logprobs] == [3] * 16
    first, expected = output.outputs[0].logprobs[0], whole.outputs[0].logprobs[0]
    assert {token: entry.logprob for token, entry in first.items()} == pytest.approx(
        {token: entry.logprob for token, entry in expected.items()}, abs=1e-4
    )
