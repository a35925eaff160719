"""What policies get to know of the model itself: W_O and the rotary embedding of the running worker, or a refusal."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt, tiny_llama_config
from vllm_kvevict import kv_eviction_args
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.checks import check_config
from vllm_kvevict.engine.frontend import needs
from vllm_kvevict.engine.models import MISSING_NEEDS, missing_needs
from vllm_kvevict.engine.worker import attention_parts
from vllm_kvevict.policies import Need
from vllm_kvevict.policies.inputs import LayerWeights

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


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """No embedding is found that rotates the keys of a model."""
    monkeypatch.setattr(attention_parts, "_rotaries", lambda module: iter(()))


SAID = (
    "kv_eviction: policy 'compactor' needs the rotary embedding of the model, which this model does not show: of its "
    "layer model.layers.0.self_attn.attn its keys are not what a rotary embedding alone makes of them. Choose a policy "
    "that does not need it"
)


@pytest.mark.usefixtures("unknown")
def test_a_server_whose_policy_needs_what_the_model_does_not_show_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(SAID)}$"), engine(tiny_llama, policy="compactor", budget=160):
        pass


@pytest.mark.usefixtures("unknown")
def test_a_request_whose_policy_needs_what_the_model_does_not_show_is_refused(tiny_llama: Path) -> None:
    with engine(tiny_llama, budget=160) as running:
        for _ in range(2):
            with pytest.raises(VLLMValidationError, match=f"^{re.escape(SAID)}$"):
                running.add(random_prompt(400, seed=1), extra_args={"kv_eviction": "compactor"})
        running.tokens([random_prompt(400, seed=1)], extra_args={"kv_eviction": "keydiff"})
        assert running.num_evictions == 1
        running.check_all_free()
        # a front end that has not asked: the request ends, and nobody else
        setattr(running.llm.llm_engine.vllm_config, MISSING_NEEDS, {})
        prompt = random_prompt(400, seed=1)
        ids = [running.add(prompt, extra_args={"kv_eviction": name}) for name in ("compactor", "keydiff")]
        outputs = running.run()
        assert [outputs[one].outputs[0].finish_reason for one in ids] == ["error", "length"]
        running.check_all_free()


def test_a_front_end_asks_once_and_only_if_a_request_chooses(tiny_llama: Path) -> None:
    asked = []

    class Client:
        vllm_config = EngineArgs(
            str(tiny_llama), skip_tokenizer_init=True, **kv_eviction_args("snapkv", budget=160)
        ).create_engine_config()

        async def collective_rpc(self, method: str) -> list[dict[str, str]]:
            asked.append(method)
            return [{}, {Need.ROTARY.name: "it has none"}]

    client = Client()
    asyncio.run(needs.ask(client, {"other": 1}))
    assert not asked
    for _ in range(2):
        asyncio.run(needs.ask(client, {"kv_eviction": "compactor"}))
    assert asked == ["missing_needs"] and missing_needs(client.vllm_config) == {"ROTARY": "it has none"}
    compactor = EvictionConfig.parse({"policy": "compactor", "budget": 160})
    with pytest.raises(ValueError, match="which this model does not show: it has none"):
        check_config(compactor, client.vllm_config)
