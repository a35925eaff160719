"""What the front ends refuse, before they hand a request to the engine or begin to stream its answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import embeds_input, mm_input, tokens_input

from vllm_kvevict import kv_eviction_args
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.checks import check_prompt
from vllm_kvevict.engine.frontend.requests import (
    with_checked_body,
    with_checked_options,
    with_early_check,
    with_early_check_of_responses,
)

CALIBRATION = {"snapkv": {"alpha": 1.0, "beta": -9.0}}
TOKENS = tokens_input(list(range(100)))
EMBEDS = embeds_input(torch.zeros(100, 4))
MIXED = embeds_input(torch.zeros(100, 4), prompt_token_ids=[0] * 100, is_token_ids=[True] * 50 + [False] * 50)
IMAGES = mm_input([0] * 100, {}, {"image": ["h"]}, {"image": [SimpleNamespace(offset=0, length=8)]})
NO_IMAGES = mm_input([0] * 100, {}, {}, {"image": []})


@pytest.fixture(scope="module")
def auto(tiny_llama: Path) -> Any:
    """The configuration of a server that chooses the budget of every prompt."""
    eviction = kv_eviction_args("snapkv", "auto", calibration=CALIBRATION)
    args = EngineArgs(model=str(tiny_llama), skip_tokenizer_init=True, enforce_eager=True, **eviction)
    return args.create_engine_config()


def front_ends(vllm_config: Any) -> list[Any]:
    """Every way into the engine: functions of a prompt and of options that say whether both were handed on."""

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any) -> Any:
        places = [place for of_kind in prompt.get("mm_placeholders", {}).values() for place in of_kind]
        features = [SimpleNamespace(mm_position=place) for place in places]
        embeds, ids = prompt.get("prompt_embeds"), prompt.get("prompt_token_ids")
        return SimpleNamespace(prompt_token_ids=ids, prompt_embeds=embeds, mm_features=features or None)

    async def generate(self: Any, prompt: Any, sampling_params: Any) -> Any:
        yield None

    async def responses(self: Any, request_id: str, engine_input: Any, sampling_params: Any) -> Any:
        yield None

    serving = SimpleNamespace(vllm_config=vllm_config, engine_client=SimpleNamespace(vllm_config=vllm_config))
    process_inputs, generate = with_checked_options(process_inputs), with_early_check(generate)
    responses = with_early_check_of_responses(responses)
    return [
        lambda prompt, options: process_inputs(serving, "id", prompt, SamplingParams(extra_args=options)),
        # not awaited, as by a server that is about to stream
        lambda prompt, options: generate(serving, prompt, SamplingParams(extra_args=options)),
        lambda prompt, options: responses(serving, "id", prompt, SamplingParams(extra_args=options)),
    ]


@pytest.mark.parametrize("way", range(3), ids=["InputProcessor", "AsyncLLM", "responses"])
def test_a_budget_is_chosen_for_prompts_of_tokens_only(auto: Any, way: int) -> None:
    hand_on = front_ends(auto)[way]
    for prompt in (TOKENS, NO_IMAGES):
        assert hand_on(prompt, {}) and hand_on(prompt, {"kv_budget_max": 0.5})
    for prompt, what in ((EMBEDS, "embeddings"), (MIXED, "embeddings"), (IMAGES, "images, audio or video")):
        for options in ({}, {"kv_budget": "auto"}, {"kv_budget_max": 0.5}):
            with pytest.raises(VLLMValidationError) as error:
                hand_on(prompt, options)
            assert str(error.value).startswith(
                "kv_budget: 'auto' is chosen by the likelihood of a prompt's tokens, and "
            )
            assert f"a prompt with {what} has places without one; give a number of tokens, or" in str(error.value)
        assert hand_on(prompt, {"kv_budget": 64}) and hand_on(prompt, {"kv_eviction": "none"})


@pytest.mark.parametrize("way", range(3), ids=["InputProcessor", "AsyncLLM", "responses"])
def test_wrong_options_never_reach_the_engine(auto: Any, way: int) -> None:
    for options in ({"kv_budgt": 64}, {"kv_eviction": "snapvk"}, {"kv_budget": 0}):
        with pytest.raises(VLLMValidationError):
            front_ends(auto)[way](TOKENS, options)
    assert front_ends(auto)[way](TOKENS, {"kv_transfer_params": {}, "kv_budget": 64})


def test_without_eviction_ours_are_refused_and_others_are_not(tiny_llama: Path) -> None:
    """In a process that has another engine, which evicts."""
    stock = EngineArgs(model=str(tiny_llama), skip_tokenizer_init=True, enforce_eager=True).create_engine_config()
    for hand_on in front_ends(stock):
        assert hand_on(TOKENS, {"kv_transfer_params": {}, "session_id": "x"})
        for option in ("kv_budget", "kv_budgt"):
            with pytest.raises(VLLMValidationError, match="this engine was started without --kv-eviction"):
                hand_on(TOKENS, {option: 64})


def test_the_body_of_a_request_is_checked_where_nothing_is_handed_on(auto: Any) -> None:
    """Beam search makes sampling parameters of its own."""

    async def check_model(self: Any, request: Any) -> Any:
        return request.refusal

    checked = with_checked_body(check_model)

    async def collective_rpc(method: str) -> list[dict[str, str]]:
        return [{}]

    serving = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=auto, collective_rpc=collective_rpc))
    wrong = {"vllm_xargs": {"kv_budgt": 64}}
    assert asyncio.run(checked(serving, SimpleNamespace(refusal=None, vllm_xargs={"kv_budget": 64}))) is None
    assert asyncio.run(checked(serving, SimpleNamespace(refusal=None))) is None
    assert asyncio.run(checked(serving, SimpleNamespace(refusal="no such model", **wrong))) == "no such model"
    with pytest.raises(VLLMValidationError, match="vllm_xargs: unknown option 'kv_budgt'"):
        asyncio.run(checked(serving, SimpleNamespace(refusal=None, **wrong)))


def test_facts_about_a_prompt_decide(auto: Any) -> None:
    """The scheduler asks the same, of requests that no front end of ours has seen."""
    from vllm_kvevict.engine.settings import eviction_config

    config = eviction_config(auto)
    assert config is not None
    check_prompt(config, auto, has_embeds=False, has_images=False)
    for has_embeds, has_images in ((True, False), (False, True), (True, True)):
        with pytest.raises(ValueError, match=r"^kv_budget: 'auto' is chosen by the likelihood"):
            check_prompt(config, auto, has_embeds=has_embeds, has_images=has_images)
        check_prompt(config.model_copy(update={"budget": 64}), auto, has_embeds=has_embeds, has_images=has_images)


@pytest.mark.parametrize("way", range(3), ids=["InputProcessor", "AsyncLLM", "responses"])
def test_a_server_whose_policy_turns_keys_back_refuses_images_of_models_with_mrope(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, way: int
) -> None:
    server = EngineArgs(
        model=str(tiny_llama), skip_tokenizer_init=True, enforce_eager=True, **kv_eviction_args("compactor", budget=160)
    ).create_engine_config()
    hand_on = front_ends(server)[way]
    assert hand_on(IMAGES, {})
    monkeypatch.setattr(type(server.model_config), "uses_mrope", True)
    with pytest.raises(VLLMValidationError, match=r"^kv_eviction: 'compactor' turns keys back by their places"):
        hand_on(IMAGES, {})
    assert hand_on(TOKENS, {}) and hand_on(IMAGES, {"kv_eviction": "none"})


def test_options_of_bodies_with_sampling_parameters_are_checked(auto: Any) -> None:
    async def check_model(self: Any, request: Any) -> Any:
        return None

    serving = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=auto))
    request = SimpleNamespace(sampling_params=SamplingParams(extra_args={"kv_budgt": 64}))

    async def collective_rpc(method: str) -> list[dict[str, str]]:
        return [{}]

    serving.engine_client.collective_rpc = collective_rpc
    with pytest.raises(VLLMValidationError, match="unknown option 'kv_budgt'"):
        asyncio.run(with_checked_body(check_model)(serving, request))


def test_policies_that_turn_keys_back_refuse_images_of_models_with_mrope(auto: Any) -> None:
    model = SimpleNamespace(uses_mrope=True)
    vllm_config = SimpleNamespace(model_config=model)
    compactor, snapkv = (EvictionConfig.parse({"policy": name, "budget": 64}) for name in ("compactor", "snapkv"))
    with pytest.raises(ValueError, match=r"^kv_eviction: 'compactor' turns keys back by their places"):
        check_prompt(compactor, vllm_config, has_embeds=False, has_images=True)
    check_prompt(compactor, vllm_config, has_embeds=False, has_images=False)
    check_prompt(snapkv, vllm_config, has_embeds=False, has_images=True)
    model.uses_mrope = False
    check_prompt(compactor, vllm_config, has_embeds=False, has_images=True)
