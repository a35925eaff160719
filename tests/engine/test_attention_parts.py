"""What policies need of a model is found by running its attention modules, whatever they are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from vllm_kvevict.engine.worker.attention_parts import AttentionParts, attention_parts
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies import Need

HEADS, KV_HEADS, SIZE, HIDDEN, POSITIONS = 4, 2, 8, 24, 128


class Linear(nn.Linear):
    """Has what vLLM's linear layers have."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out, bias=False)
        self.quant_method = None


class Attention(nn.Module):
    """vLLM's layer, as far as it is looked at; it must not run."""

    layer_name = "the layer"
    num_heads, head_size, head_size_v, dtype = HEADS, SIZE, SIZE, torch.float32


class Embedding(nn.Module):
    """A rotary embedding by its own table; of the first ``dim`` elements."""

    def __init__(self, dim: int = SIZE, base: float = 100.0, is_neox_style: bool = True, skipped: int = 0) -> None:
        super().__init__()
        angles = torch.arange(POSITIONS)[:, None] / base ** (torch.arange(0, dim, 2) / dim)
        angles = torch.cat([2 * angles[:skipped], angles])
        self.register_buffer("some_cos_sin_cache", torch.cat([angles.cos(), angles.sin()], dim=1))
        self.is_neox_style = is_neox_style
        if skipped:
            self.original_max_position_embeddings = skipped

    @property
    def rotary(self) -> Rotary:
        skipped = getattr(self, "original_max_position_embeddings", 0)
        return Rotary(self.get_buffer("some_cos_sin_cache")[skipped:], self.is_neox_style)


class Module(nn.Module):
    """What stands around an attention layer: projections, a rotary embedding, and what a model may do besides."""

    def __init__(self, embedding: Embedding | Given | None, changes: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.wq, self.wk = Linear(HIDDEN, HEADS * SIZE), Linear(HIDDEN, KV_HEADS * SIZE)
        self.inner, self.out = Attention(), Linear(HEADS * SIZE, HIDDEN)
        self.embedding, self.changes = embedding, changes

    def forward(self, position_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        query, key = self.wq(x).view(len(x), -1, SIZE), self.wk(x).view(len(x), -1, SIZE)
        if self.embedding is not None:
            rotary, place = self.embedding.rotary, position_ids[:, None]
            query, key = (rotary.rotate(part, place) for part in (query, key))
        query = self.changes.get("query", lambda q, _: q)(query, position_ids)
        key = self.changes.get("key", lambda k, _: k)(key, position_ids)
        attended = self.inner(query.flatten(1), key.flatten(1), key.flatten(1))
        return self.out(self.changes.get("output", lambda o, _: o)(attended, x))


class PassedEmbedding(nn.Module):
    """As those of transformers: it returns cosines and sines for positions, of each type of layer its own."""

    def __init__(self, base: float, is_neox_style: bool = True) -> None:
        super().__init__()
        self.register_buffer("inv_freq", base ** -(torch.arange(0, SIZE, 2) / SIZE))
        self.is_neox_style = is_neox_style

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slower = 10.0 if layer_type == "full_attention" else 1.0
        angles = position_ids[..., None] * self.get_buffer("inv_freq") / slower
        angles = torch.cat([angles, angles], dim=-1) if self.is_neox_style else angles.repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


@dataclass
class Given:
    rotary: Rotary


class PassedModule(Module):
    """An attention module of transformers."""

    def __init__(self, layer_type: str | None, is_neox_style: bool, changes: dict[str, Callable[..., Any]]) -> None:
        super().__init__(None, changes)
        layer_types = None if layer_type is None else ["sliding_attention", layer_type]
        config = {"layer_types": layer_types, "max_position_embeddings": POSITIONS}
        self.config, self.layer_idx, self.is_neox_style = type("Config", (), config)(), 1, is_neox_style

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Any = None,
    ) -> torch.Tensor:
        assert attention_mask is None and cache is None
        cos, sin = (table[0] for table in position_embeddings)
        part = cos.shape[-1] // 2
        halves = [table[:, :part] if self.is_neox_style else table[:, ::2] for table in (cos, sin)]
        self.embedding = Given(Rotary(torch.cat(halves, dim=-1), self.is_neox_style))
        return super().forward(torch.arange(len(cos)), hidden_states[0])


def found(module: nn.Module, *embeddings: nn.Module) -> AttentionParts:
    torch.manual_seed(0)
    model = nn.Module()
    model.embeddings = nn.ModuleList(embeddings)
    model.layers = nn.ModuleList([module])
    model.config = type("Config", (), {"hidden_size": HIDDEN, "get_text_config": lambda self: self})()
    before = dict(module.named_modules())
    with torch.inference_mode():
        (parts,) = attention_parts(model, ["the layer"], POSITIONS)
    assert dict(module.named_modules()) == before and not module._forward_pre_hooks
    return parts


def scaled(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return x * (1 + positions[:, None, None].float().log1p())


def weighted(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A norm behind the rotation, its weights learned."""
    return x / x.norm(dim=-1, keepdim=True) * torch.linspace(0.5, 2.0, SIZE)


def gated(attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return attended * torch.sigmoid(x[:, :1])


@pytest.mark.parametrize(
    "embedding",
    [
        Embedding(),
        Embedding(is_neox_style=False),
        Embedding(dim=4),
        Embedding(skipped=16),
    ],
    ids=["whole", "of neighbours", "of a part", "for long contexts"],
)
def test_the_embedding_that_rotates_the_keys_is_found(embedding: Embedding) -> None:
    rotary = found(Module(embedding, {})).rotary
    assert rotary is not None and rotary.is_neox_style == embedding.is_neox_style
    torch.testing.assert_close(rotary.cos_sin, embedding.rotary.cos_sin, rtol=0, atol=0)


def test_of_two_embeddings_the_one_that_is_used_is_found() -> None:
    module = Module(Embedding(), {})
    module.local_embedding = Embedding(base=7.0)
    parts = found(module)
    assert parts.rotary is not None and parts.faults == {}
    torch.testing.assert_close(parts.rotary.cos_sin, module.embedding.rotary.cos_sin, rtol=0, atol=0)
    module.embedding, module.local_embedding = module.local_embedding, module.embedding
    other = found(module).rotary
    assert other is not None and not torch.equal(other.cos_sin, parts.rotary.cos_sin)


def test_a_layer_that_rotates_nothing_has_an_embedding_that_changes_nothing() -> None:
    module = Module(None, {})
    module.unused = Embedding()
    rotary = found(module).rotary
    assert rotary is not None
    x = torch.randn(2, 5, SIZE)
    torch.testing.assert_close(rotary.unrotate(x, torch.arange(1000, 1005)), x, rtol=0, atol=0)


def test_queries_may_be_scaled_by_their_positions() -> None:
    assert found(Module(Embedding(), {"query": scaled})).faults == {}


@pytest.mark.parametrize("layer_type", [None, "sliding_attention", "full_attention"])
@pytest.mark.parametrize("is_neox_style", [True, False])
def test_an_embedding_that_is_passed_to_the_module_is_found(is_neox_style: bool, layer_type: str | None) -> None:
    module, embedding = PassedModule(layer_type, is_neox_style, {}), PassedEmbedding(100.0, is_neox_style)
    parts = found(module, embedding)
    assert parts.faults == {} and parts.rotary is not None and parts.output_projection is module.out
    places = torch.arange(40, 45)
    cos, sin = (table[0] for table in embedding(None, places[None], layer_type))
    halves = [table[:, : SIZE // 2] if is_neox_style else table[:, ::2] for table in (cos, sin)]
    expected, x = Rotary(torch.cat(halves, dim=-1), is_neox_style), torch.randn(2, 5, SIZE)
    torch.testing.assert_close(parts.rotary.rotate(x, places), expected.rotate(x, torch.arange(5)))


def test_what_changes_keys_behind_a_passed_embedding_is_named() -> None:
    assert found(PassedModule(None, True, {"key": weighted}), PassedEmbedding(100.0)).rotary is None


def test_the_table_of_a_passed_embedding_holds_the_longest_text() -> None:
    """vLLM serves longer texts than the configuration has positions, of linear scaling for example."""
    module = PassedModule(None, True, {})
    module.config.max_position_embeddings = POSITIONS // 4
    rotary = found(module, PassedEmbedding(100.0)).rotary
    assert rotary is not None and len(rotary.cos_sin) == POSITIONS


def test_a_passed_embedding_that_depends_on_the_length_of_the_text_is_named() -> None:
    """As dynamic scaling does, which changes its frequencies when a text is longer: it must not notice the trial."""

    class Dynamic(PassedEmbedding):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: Any = None) -> Any:
            if int(position_ids.max()) > 110:
                self.get_buffer("inv_freq").mul_(0.5)
            return super().forward(x, position_ids, layer_type)

    embedding = Dynamic(100.0)
    before = embedding.get_buffer("inv_freq").clone()
    assert found(PassedModule(None, True, {}), embedding).rotary is None
    assert torch.equal(embedding.get_buffer("inv_freq"), before)


def test_layers_that_share_a_table_share_its_description() -> None:
    embedding = Embedding(skipped=16)
    layers = [Module(embedding, {}), Module(embedding, {}), Module(None, {}), Module(None, {})]
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    model.config = type("Config", (), {"hidden_size": HIDDEN, "get_text_config": lambda self: self})()
    names = [f"layer {number}" for number in range(4)]
    for layer, name in zip(layers, names, strict=True):
        layer.inner.layer_name = name
    first, second, third, fourth = (parts.rotary for parts in attention_parts(model, names, POSITIONS))
    assert first is second is not None and third is fourth is not None and first is not third


def test_a_model_without_a_text_configuration_starts() -> None:
    module = Module(Embedding(), {})
    model = nn.Module()
    model.layers = nn.ModuleList([module])
    (parts,) = attention_parts(model, ["the layer"], POSITIONS)
    assert {*parts.faults} == {Need.ROTARY, Need.OUTPUT_PROJECTION}


def test_of_several_passed_embeddings_none_is_guessed() -> None:
    faults = found(PassedModule(None, True, {}), PassedEmbedding(100.0), PassedEmbedding(7.0)).faults
    assert all("the model has 2 that may be meant" in fault for fault in faults.values()) and len(faults) == 2


@pytest.mark.parametrize("part", ["query", "key"])
def test_what_changes_keys_or_queries_behind_their_rotation_is_named(part: str) -> None:
    parts = found(Module(Embedding(), {part: weighted}))
    assert parts.rotary is None and parts.output_projection is not None
    assert parts.faults == {Need.ROTARY: "its keys are not what a rotary embedding alone makes of them"}


def test_keys_that_are_scaled_by_their_positions_are_named() -> None:
    assert found(Module(Embedding(), {"key": scaled})).rotary is None


def test_the_projection_is_the_linear_layer_that_is_given_what_attention_returned() -> None:
    module = Module(Embedding(), {})
    assert found(module).output_projection is module.out
    parts = found(Module(Embedding(), {"output": gated}))
    assert parts.output_projection is None and parts.rotary is not None
    assert parts.faults == {Need.OUTPUT_PROJECTION: "what attention returns is changed before it is projected"}


def test_a_module_that_cannot_run_alone_is_named() -> None:
    class Other(Module):
        def forward(self, position_ids: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            raise NotImplementedError

    assert "mask" in inspect.signature(Other.forward).parameters
    faults = found(Other(None, {})).faults
    assert {*faults} == {Need.ROTARY, Need.OUTPUT_PROJECTION}
    assert all("cannot be run alone (ValueError: it asks for mask)" in fault for fault in faults.values())
