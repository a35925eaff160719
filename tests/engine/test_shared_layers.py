"""Layers that read the keys and values of others, as Gemma 3n's: what goes is chosen by the queries of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import USES_V2_RUNNER
from tests.engine.dense_decode import BLOCK, Budget, Score, check_kept, h2o, run_and_watch, tova
from tests.engine.harness import Engine, engine
from tests.tiny_llama import VOCAB_SIZE, random_prompt
from tools.matrix.families import family_named
from vllm_kvevict.engine.models import windows_of
from vllm_kvevict.engine.offline.check.dense import DenseModel
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.engine.worker.sharing import sharing_targets
from vllm_kvevict.policies import Need

pytestmark = pytest.mark.on_v1

BUDGET, NUM_KV_HEADS = 128, 2
NUM_BLOCKS = BUDGET // BLOCK
READERS = [[1], [3, 5, 7]]  # of the pages of each layer with full attention; the others have windows, and share, too


@pytest.fixture(scope="module")
def tiny_gemma3n(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, num_layers = tmp_path_factory.mktemp("tiny_gemma3n"), 8
    family = family_named("Gemma 3n")
    more = {
        "num_hidden_layers": num_layers,
        "num_kv_shared_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "intermediate_size": [256] * num_layers,
        "activation_sparsity_pattern": [0.0] * num_layers,
    }
    replace(family, fields={**family.fields, **more}).build(folder)
    return folder


@pytest.fixture(scope="module")
def running(tiny_gemma3n: Path) -> Iterator[Engine]:
    settings: dict[str, Any] = {"logprobs_mode": "raw_logits", "max_logprobs": -1}
    with engine(tiny_gemma3n, budget=BUDGET, fields={"allocator": "uniform"}, **settings) as started:
        started.poison_unowned_memory()
        yield started


@pytest.fixture(scope="module")
def model(tiny_gemma3n: Path) -> DenseModel:
    return DenseModel(tiny_gemma3n)


class SharedDense:
    """The dense model as one of layers with pages, each of which has the query heads of all that read them."""

    def __init__(self, model: DenseModel, readers: list[list[int]]) -> None:
        self._model, self._readers = model, readers
        self.queries: list[torch.Tensor] = []
        self.keys: list[torch.Tensor] = []

    def logits(self, tokens: list[int]) -> torch.Tensor:
        logits = self._model.logits(tokens)
        self._join()
        return logits

    def logits_of_visible(self, tokens: list[int], visible: torch.Tensor) -> torch.Tensor:
        order = sorted((layer, index) for index, layers in enumerate(READERS) for layer in layers)
        logits = self._model.logits_of_visible(tokens, visible[[index for _, index in order]])
        self._join()
        return logits

    def _join(self) -> None:
        self.keys = [self._model.keys[first] for first, *_ in self._readers]
        self.queries = [
            torch.cat([self._model.queries[layer].unflatten(1, (NUM_KV_HEADS, -1)) for layer in layers], 2).flatten(
                1, 2
            )
            * self.keys[0].shape[2] ** 0.5  # these models scale nothing
            for layers in self._readers
        ]


BY_BLOCK = {"kv_evict_during_decode": 1}
# they look at outputs, W_O, the rotary embedding, or the answer; slow in Triton's interpreter
OTHER_POLICIES = (
    [] if USES_V2_RUNNER else ["obcache_v", "criticalkv", "expected_attention", "compactor", "laq_deferred"]
)
CASES = [
    pytest.param("tova", tova, 1, BY_BLOCK, id="tova by block"),
    pytest.param("h2o", h2o, 32, BY_BLOCK, id="h2o by block"),
    pytest.param("tova", tova, 1, {**BY_BLOCK, "kv_evict_interval": 1}, id="tova by token"),
    pytest.param("h2o", h2o, 32, {**BY_BLOCK, "kv_evict_interval": 1}, id="h2o by token"),
    pytest.param("h2o", h2o, 32, {**BY_BLOCK, "kv_evict_during_prefill": 1}, id="h2o by chunk and block"),
    pytest.param("tova", tova, 1, {**BY_BLOCK, "kv_evict_during_prefill": 1}, id="tova by chunk and block"),
]


@pytest.mark.feature("models whose layers share keys and values")
@pytest.mark.parametrize(("policy", "score", "num_recent", "schedule"), CASES)
def test_tokens_kept_and_answers_are_those_of_a_dense_model(
    running: Engine, model: DenseModel, policy: str, score: Score, num_recent: int, schedule: dict[str, int]
) -> None:
    """At the end of the prompt, between its chunks, and while the answer grows."""
    prompt, per_token = random_prompt(203, seed=203), "kv_evict_interval" in schedule
    num_answered = 20 if per_token else 60
    with running.in_chunks(90):
        options = {"kv_eviction": policy, **schedule}
        answer, held, kept = run_and_watch(running, prompt, per_token, max_tokens=num_answered, extra_args=options)
    assert len(answer) == num_answered and set(held[-12:]) == {NUM_BLOCKS}
    assert len(kept) >= (num_answered - 1 if per_token else 3)
    budget = Budget(NUM_BLOCKS, 0, num_recent, per_token_from=0 if per_token else None)
    tokens = [*prompt, *answer]
    num_swaps, logits = check_kept(SharedDense(model, READERS), tokens, kept, score, budget)
    assert num_swaps <= 2
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    with pytest.raises(AssertionError):  # the layer that writes the pages would have kept others by itself
        check_kept(SharedDense(model, [layers[:1] for layers in READERS]), tokens, kept, score, budget)
    running.check_all_free()


@pytest.mark.parametrize(("policy", "chunk"), [("snapkv", 130), ("obcache_v", 2048)])
def test_logits_equal_masked_dense_forward(
    running: Engine, model: DenseModel, kept_masks: list[torch.Tensor], policy: str, chunk: int
) -> None:
    prompt = random_prompt(300, seed=1)
    with running.in_chunks(chunk):
        (output,) = running.generate(
            [prompt], max_tokens=20, logprobs=-1, extra_args={"kv_eviction": policy}, skip_reading_prefix_cache=True
        )
    (completion,), (kept,) = output.outputs, kept_masks
    tokens = [*prompt, *completion.token_ids[:-1]]
    logits = torch.tensor([[step[token].logprob for token in range(VOCAB_SIZE)] for step in completion.logprobs])
    assert kept.shape == (len(READERS), NUM_KV_HEADS, 300)
    whole = model.logits(tokens)[299:]
    assert (logits[0] - whole[0]).abs().max() < 1e-3 and (logits[1:] - whole[1:]).abs().max() > 0.1
    assert (logits - model.logits(tokens, kept)[299:]).abs().max() < 1e-3
    running.check_all_free()


def test_requests_are_answered_as_alone(running: Engine) -> None:
    """Whole ones beside evicted ones, and several of a kind, whose scores are made together."""
    options: list[dict[str, Any]] = [
        {"kv_eviction": "none"},
        {},
        {},
        *[{"kv_eviction": "h2o", **BY_BLOCK}] * 2,
        *[{"kv_eviction": "tova", **BY_BLOCK, "kv_evict_interval": 1}] * 2,
        *({"kv_eviction": policy} for policy in OTHER_POLICIES),
    ]
    prompts = [random_prompt(150 + index, seed=index) for index in range(len(options))]  # the next block is near
    running.check_as_alone(list(zip(prompts, options, strict=True)), 12)


def test_pages_are_those_of_layers_that_write(running: Engine) -> None:
    assert running.bridge.pool.num_layers == len(READERS)
    assert running.scheduler._pages_per_block == len(READERS) * NUM_KV_HEADS
    assert sorted(running.bridge.layer_index.values()) == [0, 1, 1, 1]
    assert windows_of(running.llm.llm_engine.vllm_config) == running.scheduler._cache.windows != ()
    # the ring has the queries of all that read
    assert running.bridge.ring.num_bytes == 4 * running.bridge.ring.slots.max_num_reqs * running.bridge.ring.depth * (
        running.bridge.ring.bytes_per_query
    )


def test_layers_that_rotate_otherwise_are_told_apart(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bridge = running.worker.model_runner.model, running.bridge
    names = [name for name, reader in bridge.readers._named.items() if reader.writes]
    targets = sharing_targets(running.llm.llm_engine.vllm_config, names)
    assert ModelWeights(model, names, 2048, None, targets).missing == {}
    modules = dict(model.named_modules())
    last, windowed = (modules[f"model.layers.{layer}.self_attn"] for layer in (7, 6))
    monkeypatch.setattr(last, "rotary_emb", windowed.rotary_emb)
    missing = ModelWeights(model, names, 2048, None, targets).missing
    assert missing.keys() == {Need.ROTARY.name}
    assert missing[Need.ROTARY.name] == (
        "of its layer model.layers.7.self_attn.attn queries are rotated otherwise than the keys of "
        "model.layers.3.self_attn.attn, which it reads"
    )


def test_layers_whose_logits_are_others_than_their_target_s_are_refused() -> None:
    def layer(scale: float, target: str | None, cap: float = 0.0, sinks: object = None) -> SimpleNamespace:
        impl = SimpleNamespace(scale=scale, logits_soft_cap=cap, sinks=sinks)
        return SimpleNamespace(impl=impl, kv_sharing_target_layer_name=target)

    layers = {"a": layer(1.0, None), "b": layer(0.5, None), "c": layer(1.0, "a"), "d": layer(1.0, "b")}
    layers |= {"e": layer(0.5, None), "f": layer(0.5, "e", 30.0), "g": layer(1.0, None), "h": layer(1.0, "g", 0.0, 1)}
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    assert sharing_targets(config, ["a"]) == {"c": "a"}
    for target, message in {
        "b": r"layer d reads the keys of b with a softmax scale of 1\.0, and that layer has 0\.5",
        "e": r"layer f reads the keys of e with a soft-capping of 30\.0, and that layer has 0\.0",
        "g": "layer h reads the keys of g, and has attention sinks",
    }.items():
        with pytest.raises(ValueError, match=message + ".*Use another model, or leave --kv-eviction out"):
            sharing_targets(config, [target])
