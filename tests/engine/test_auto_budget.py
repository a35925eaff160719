"""``--kv-budget auto`` in a real engine: the likelihood of a prompt decides how many blocks stay, and only those do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import embeds_input

from tests.conftest import USES_V2_RUNNER
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.budgets.curve import Calibration
from vllm_kvevict.engine.offline.check.dense import DenseModel
from vllm_kvevict.engine.worker.likelihood import STRIDE
from vllm_kvevict.eviction.record import recorded_evictions

BLOCK, TARGET = 32, 0.9
# random prompts of the tiny model have 6.4 to 7.5 nats
CALIBRATION = Calibration(alpha=10.0, beta=-74.0)
FIELDS = {"calibration": {"snapkv": CALIBRATION.model_dump()}, "budget_target": TARGET}


# Triton's interpreter takes its time
@pytest.fixture(
    scope="module", params=[True] if USES_V2_RUNNER else [True, False], ids=lambda caching: f"cache={caching}"
)
def running(tiny_llama: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with engine(tiny_llama, budget="auto", fields=FIELDS, enable_prefix_caching=request.param) as started:
        started.poison_unowned_memory()
        yield started


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> DenseModel:
    return DenseModel(tiny_llama)


def expected_blocks(dense: DenseModel, prompt: list[int]) -> int:
    """By the definition: every sixteenth token's likelihood, the curve, and blocks."""
    log_probabilities = dense.logits(prompt).log_softmax(-1)
    places = range(STRIDE // 2, len(prompt) - 1, STRIDE)
    nll = -sum(float(log_probabilities[place, prompt[place + 1]]) for place in places) / len(places)
    bend = CALIBRATION.alpha * nll + CALIBRATION.beta
    fraction = math.log(1 + TARGET * (math.exp(bend) - 1)) / bend
    fraction = min(max(fraction, 0.05), 0.95)
    return max(math.ceil(fraction * len(prompt) / BLOCK), 2)


@pytest.mark.feature("a budget chosen for each prompt")
@pytest.mark.parametrize(
    "length",
    [150, 640]
    if USES_V2_RUNNER
    else [150, 640, pytest.param(1500, marks=pytest.mark.more("prompts that are longer still"))],
)
def test_as_many_blocks_stay_as_the_likelihood_says(running: Engine, dense: DenseModel, length: int) -> None:
    found = set()
    for seed in range(3):
        prompt = random_prompt(length, seed=1000 * length + seed)
        running.add(prompt, max_tokens=30)
        with recorded_evictions() as records:
            for _ in range(3):
                running.step()
        (record,) = records
        found.add(expected_blocks(dense, prompt))
        assert record.plan.num_kept_blocks == expected_blocks(dense, prompt)
        (request_id,) = running.scheduler.requests
        assert len(running.blocks_held(request_id, length)) == record.plan.num_kept_blocks
        (output,) = running.run().values()
        answer = list(output.outputs[0].token_ids)
        logits = dense.logits([*prompt, *answer], record.kept)
        assert logits[length - 1 : -1].argmax(-1).tolist() == answer
        running.check_all_free()
    assert length < 600 or len(found) > 1, "these prompts should differ in what they need"


@pytest.mark.parametrize("chunk", [100, pytest.param(333, marks=pytest.mark.more("chunks of another size"))])
def test_chunks_do_not_change_the_choice(tiny_llama: Path, running: Engine, chunk: int) -> None:
    prompts = [random_prompt(400, seed=seed) for seed in range(3)]
    with recorded_evictions() as whole:
        for prompt in prompts:
            running.generate([prompt])
    with running.in_chunks(chunk), recorded_evictions() as cut:
        running.generate(prompts)
    assert sorted(each.plan.num_kept_blocks for each in cut) == sorted(each.plan.num_kept_blocks for each in whole)


def test_bounds_of_a_request(running: Engine) -> None:
    prompt = random_prompt(640, seed=4)
    kept = []
    for options in ({"kv_budget_max": 0.2}, {"kv_budget_min": 0.8}, {"kv_budget": 0.5}, {"kv_budget": 128}):
        with recorded_evictions() as records:
            running.generate([prompt], extra_args=options)
        kept.append(records[0].plan.num_kept_blocks)
    assert kept == [4, 16, 10, 4]
    running.check_all_free()


def test_requests_of_all_kinds_in_one_batch_are_as_alone(running: Engine) -> None:
    options: list[dict[str, Any]] = [{}, {"kv_budget": 128}, {"kv_eviction": "none"}, {"kv_budget_max": 0.3}, {}]
    cases = [(random_prompt(200 + 130 * index, seed=index), each) for index, each in enumerate(options)]
    running.check_as_alone(cases, max_tokens=80)


def test_prompts_of_embeddings_are_refused(running: Engine) -> None:
    """Their tokens are not known, and what stood in their places was the tokens of another request."""
    engine = running.llm.llm_engine
    embeds = embeds_input(torch.zeros(200, engine.model_config.get_hidden_size()))
    for options in ({}, {"kv_budget_max": 0.5}, {"kv_budget": "auto"}):
        with pytest.raises(VLLMValidationError, match="a prompt with embeddings has places without one; give a number"):
            engine.add_request("embeds", embeds, SamplingParams(extra_args=options))
    assert not engine.has_unfinished_requests()


def test_aborted_at_any_step(running: Engine) -> None:
    for num_steps in range(4):
        request_id = running.add(random_prompt(900, seed=num_steps), max_tokens=50)
        for _ in range(num_steps):
            running.step()
        running.llm.llm_engine.abort_request([request_id])
        running.run()
        running.check_all_free()
