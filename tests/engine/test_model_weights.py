"""What policies get to know of the model itself: W_O and the rotary embedding of the running worker, or a refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from vllm.config import ModelConfig

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt, tiny_llama_config
from vllm_kvevict.engine.models import check_needs
from vllm_kvevict.policies import Need
from vllm_kvevict.policies.compactor import Compactor
from vllm_kvevict.policies.criticalkv import CriticalKV
from vllm_kvevict.policies.inputs import LayerWeights
from vllm_kvevict.policies.snapkv import SnapKV

BOTH = frozenset({Need.ROTARY, Need.OUTPUT_PROJECTION})


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    """An engine that has evicted by W_O, as configured, and by the rotary embedding, as one request asked for."""
    with engine(tiny_llama, policy="criticalkv", budget=160) as started:
        started.tokens([random_prompt(300, seed=0)])
        started.tokens([random_prompt(400, seed=1)], extra_args={"kv_eviction": "compactor"})
        assert started.num_evictions == 2
        yield started


@pytest.mark.parametrize("layer", [0, 1])
def test_the_output_projection_is_that_of_the_checkpoint(running: Engine, tiny_llama: Path, layer: int) -> None:
    checkpoint = load_file(tiny_llama / "model.safetensors")
    expected = checkpoint[f"model.layers.{layer}.self_attn.o_proj.weight"]
    projection = running.bridge._weights.of(layer, BOTH).output_projection
    # products with ones and zeros: nothing is rounded in float32
    torch.testing.assert_close(projection, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_rotary_embedding_is_that_of_transformers(running: Engine, layer: int) -> None:
    rotary = running.bridge._weights.of(layer, BOTH).rotary
    positions = torch.arange(2048)
    x = torch.randn(1, 3, len(positions), 32)
    cos, sin = LlamaRotaryEmbedding(tiny_llama_config())(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(rotary.rotate(x[0], positions), expected[0], rtol=0, atol=2e-6)


def test_only_what_is_asked_for_is_handed_out(running: Engine) -> None:
    weights = running.bridge._weights
    assert weights.of(0, frozenset({Need.ALL_QUERIES, Need.OUTPUTS})) == LayerWeights()
    assert weights.of(0, frozenset({Need.ROTARY})).output_projection is None
    assert weights.of(0, frozenset({Need.OUTPUT_PROJECTION})).rotary is None


def model_config(folder: Path, changes: dict[str, object]) -> ModelConfig:
    """Return vLLM's view of the tiny Llama with another config.json."""
    config = tiny_llama_config().to_dict()
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"], **changes}))
    return ModelConfig(str(folder), skip_tokenizer_init=True)


REFUSED = {
    "architecture": ({"architectures": ["OlmoForCausalLM"], "model_type": "olmo"}, "OlmoForCausalLM"),
    "mrope": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        "a model with multimodal rotary embeddings",
    ),
}


@pytest.mark.more_on_v2("what is refused depends on the configuration alone")
@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_not_known_well_enough_are_refused(tmp_path: Path, case: str) -> None:
    changes, found = REFUSED[case]
    config = model_config(tmp_path, changes)
    for policy, need in ((Compactor(), Need.ROTARY), (CriticalKV(), Need.OUTPUT_PROJECTION)):
        known = f"kv_eviction: policy {policy.name!r} needs {need.value}, which is known for LlamaForCausalLM, "
        with pytest.raises(ValueError, match=f"^{re.escape(known)}.*; got {found}[^\\n]*$"):
            check_needs(policy.name, policy, [config])
    check_needs("snapkv", SnapKV(), [config])


def test_known_models_are_accepted(tmp_path: Path) -> None:
    config = model_config(tmp_path, {})
    for policy in (Compactor(), CriticalKV(), CriticalKV(policy="compactor")):
        check_needs(policy.name, policy, [config])
