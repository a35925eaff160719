"""Prompts with images, through a vision tower and a language model: LLaVA, and Gemma 3 whose images see themselves.

On CPU vLLM's attention reads an image of Gemma 3 token by token, like text. Model runner V2 serves it with Triton
attention here, in which each token of an image sees all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.conftest import USES_V2_RUNNER
from tests.engine.dense_decode import run_and_watch
from tests.engine.dense_images import DenseImages
from tests.engine.harness import Engine, engine
from tests.tiny_images import BEGIN, IMAGE, IMAGE_LEN, VOCAB, build_tiny_gemma3, build_tiny_llava, illustrated, picture
from tests.without_torchvision import image_models
from vllm_kvevict.engine.worker import cpu_worker
from vllm_kvevict.engine.worker.backends.base import backend_in_place_of
from vllm_kvevict.engine.worker.backends.triton import EvictionTritonBackend

BUDGET, NUM_STEPS = 96, 8
WHOLE, PROTECTED = {"kv_eviction": "none"}, {"kv_protect_multimodal": 1}
BY_BLOCK = {"kv_evict_during_decode": 1}
BY_TOKEN = BY_BLOCK | {"kv_evict_interval": 1}
SETTINGS = {
    "skip_tokenizer_init": False,
    "limit_mm_per_prompt": {"image": 2},
    "disable_chunked_mm_input": True,  # as on a GPU: an image that sees itself is read in one step
    "max_num_batched_tokens": 128,
    "kv_cache_memory_bytes": 32 << 20,
    "logprobs_mode": "raw_logits",
    "max_logprobs": -1,
}


@dataclass
class Seeing:
    """An engine of a model that sees images."""

    running: Engine
    folder: Path
    placeholder: int
    sees_itself: bool

    def prompt(self, *parts: Any, seed: int = 1) -> dict[str, Any]:
        return illustrated(*parts, seed=seed, placeholder=self.placeholder)

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """With two images, with none, with one at the end, and short."""
        return [
            self.prompt(30, picture(1), 90, picture(2), 20),
            self.prompt(140, seed=2),
            self.prompt(110, picture(3), 3, seed=3),
            self.prompt(10, picture(2), 12, seed=4),
        ]


pytestmark = [
    pytest.mark.on_v1,
    pytest.mark.more_on_v2("on V1 the same prompts are evicted, in models whose images are causal"),
]
ON_V1 = pytest.mark.skipif(
    USES_V2_RUNNER, reason="what is protected is decided by scheduler and policies, on no runner"
)


@pytest.fixture(scope="module", params=["gemma3"] if USES_V2_RUNNER else ["llava", "gemma3"])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeing]:
    folder, sees_itself = tmp_path_factory.mktemp(request.param), False
    with image_models(), pytest.MonkeyPatch.context() as patch:
        if request.param == "llava":
            build_tiny_llava(folder)
        else:
            build_tiny_gemma3(folder)
            sees_itself = USES_V2_RUNNER
        if sees_itself:
            # vLLM asks for it before it launches the kernel that writes keys and values
            patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
            ours = backend_in_place_of(AttentionBackendEnum.CPU_ATTN, EvictionTritonBackend)
            patch.setattr(cpu_worker, "cpu_backend", lambda: ours)
        with engine(folder, budget=BUDGET, fields={"allocator": "adakv"}, **SETTINGS) as running:
            running.poison_unowned_memory()
            yield Seeing(running, folder, IMAGE if request.param == "llava" else BEGIN, sees_itself)


def logits_of(output: Any) -> torch.Tensor:
    return torch.tensor([[step[token].logprob for token in range(VOCAB)] for step in output.outputs[0].logprobs])


@pytest.mark.feature("images, whose tokens may see each other")
def test_logits_are_those_of_a_dense_model_over_the_tokens_kept(seeing: Seeing, kept_masks: list[torch.Tensor]) -> None:
    (output,) = seeing.running.generate(seeing.prompts[:1], max_tokens=NUM_STEPS, logprobs=-1)
    length, (kept,) = len(output.prompt_token_ids), kept_masks
    tokens, logits = [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]], logits_of(output)
    assert tokens.count(IMAGE) == 2 * IMAGE_LEN
    dense = DenseImages(seeing.folder, seeing.sees_itself)
    dense.show([picture(1), picture(2)])
    whole = dense.logits(tokens)[length - 1 :]
    assert (logits[0] - whole[0]).abs().max() < 1e-3
    assert (logits - dense.logits(tokens, kept)[length - 1 :]).abs().max() < 1e-3
    # the check can tell what is evicted, and what images see
    assert (logits[1:] - whole[1:]).abs().max() > 0.1
    dense.sees_itself = not dense.sees_itself
    assert (logits - dense.logits(tokens, kept)[length - 1 :]).abs().max() > 1e-2


@pytest.mark.feature("images, whose tokens may see each other")
def test_evicted_and_whole_rows_are_answered_in_a_batch_as_alone(seeing: Seeing) -> None:
    """The first ones decode, evicted or whole, while images of the next ones are read in the same steps."""
    options = [{}, WHOLE, PROTECTED | {"kv_budget": 160}, {"kv_eviction": "h2o", **BY_BLOCK}]
    cases = [(prompt, each) for each in options for prompt in seeing.prompts]
    if seeing.sees_itself:  # Triton's interpreter takes its time
        cases = [(prompt, each) for each in options[:2] for prompt in seeing.prompts[::2]]
    before, seeing.running.max_running = seeing.running.num_evictions, 0
    seeing.running.check_as_alone(cases, 6 if seeing.sees_itself else 24)
    assert seeing.running.num_evictions >= before + len(cases) // 2
    assert seeing.running.max_running > len(cases) // 2


@ON_V1
@pytest.mark.parametrize("seeing", ["llava"], indirect=True)
def test_protected_images_stay_in_every_layer_and_head(seeing: Seeing, kept_masks: list[torch.Tensor]) -> None:
    choices = [{"kv_eviction": name} for name in ("snapkv", "h2o", "compactor")] + [{"kv_budget_allocator": "lava"}]
    prompt, missing = seeing.prompt(30, picture(1), 150, picture(2), 60), []
    for options in choices:
        share = []
        for protection in ({}, PROTECTED, PROTECTED | {"kv_budget": 0.1}):
            extra = {"kv_budget": 200} | options | protection
            # some policies look at the answer
            (output,) = seeing.running.generate([prompt], max_tokens=12, extra_args=extra)
            is_image = torch.tensor(output.prompt_token_ids) == IMAGE
            share.append(kept_masks[-1][..., : len(is_image)][..., is_image].float().mean().item())
        assert share[1:] == [1.0, 1.0], options
        missing.append(share[0] < 1.0)
    assert len(kept_masks) == 3 * len(choices) and all(missing)  # without the option some of them go
    seeing.running.check_all_free()


@ON_V1
@pytest.mark.parametrize("seeing", ["llava"], indirect=True)
@pytest.mark.parametrize(
    "schedule",
    [
        {"kv_eviction": "snapkv", **BY_BLOCK},
        {"kv_eviction": "h2o", **BY_TOKEN},
        {"kv_eviction": "tova", "kv_evict_during_prefill": 1, **BY_TOKEN},
        {"kv_eviction": "streaming_llm", "kv_evict_during_prefill": 1, **BY_BLOCK},
    ],
    ids=lambda options: " ".join(options),
)
def test_protected_images_stay_while_eviction_goes_on(seeing: Seeing, schedule: dict[str, Any]) -> None:
    prompt = seeing.prompt(30, picture(1), 90, picture(2), 80)
    images = {*range(30, 30 + IMAGE_LEN), *range(120 + IMAGE_LEN, 120 + 2 * IMAGE_LEN)}
    stayed = []
    for protection in ({}, PROTECTED):
        extra = {"kv_budget": 160} | schedule | protection
        _, held, kept = run_and_watch(seeing.running, prompt, True, max_tokens=70, extra_args=extra)
        assert held[-1] == 5
        stayed.append([[images <= {*head} for layer in layers for head in layer] for layers in kept.values()])
    heads_at_the_end, always = stayed[0][-1], stayed[1]
    assert not all(heads_at_the_end) and len(always) >= 60
    if "kv_evict_during_prefill" in schedule:  # the second image is still to come
        always = always[2:]
    assert all(map(all, always))
    seeing.running.check_all_free()


@ON_V1
@pytest.mark.parametrize("seeing", ["llava"], indirect=True)
def test_images_that_a_budget_cannot_hold_are_refused(seeing: Seeing) -> None:
    expected = (
        "kv_budget: expected at least 129 tokens, got 96: blocks hold 32, and 'snapkv' needs 104 tokens in every head "
        "(104 protected, 72 of images, audio and video, 32 observed), of which the prompt's last block may hold but "
        "one. Raise the budget, or say kv_protect_multimodal false"
    )
    with pytest.raises(VLLMValidationError) as error:
        seeing.running.add(seeing.prompts[0], extra_args=PROTECTED)
    assert str(error.value) == expected
    # one image is held, and a prompt that is within its budget is not evicted
    seeing.running.tokens([seeing.prompts[2]], extra_args=PROTECTED | {"kv_budget": 128}, max_tokens=2)
    short = seeing.prompt(5, picture(1), 5, picture(2), 5)
    seeing.running.tokens([short], extra_args=PROTECTED, max_tokens=2)
