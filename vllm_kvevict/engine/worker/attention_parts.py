"""What stands around an attention layer of a loaded model, found by running the module that holds it on dummy tokens.

No model is known by its name: a rotary embedding counts if it is all that tells the keys of one token at several
positions apart, and a linear layer is the output projection if it is given what attention returned.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA

from vllm_kvevict.engine.worker.passed_embeddings import PassedEmbeddings, is_of_transformers
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies.base import Need

_POSITIONS = (0, 1, 6, 100)  # of the dummy tokens, as far as the model has them
# what rounding may make of a key, as a part of its largest element
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ARGUMENTS = {"positions": ("positions", "position_ids"), "hidden_states": ("hidden_states", "hidden_state", "x")}


@dataclass(frozen=True)
class AttentionParts:
    """Of one attention layer.

    attention:         vLLM's layer itself
    rotary:            how it rotates its keys; None where that was not found
    output_projection: the linear layer behind it; None likewise
    faults:            why not, for each of the two needs
    """

    attention: Any
    rotary: Rotary | None
    output_projection: Any
    faults: dict[Need, str]


def attention_parts(model: nn.Module, layer_names: Sequence[str], max_model_len: int) -> list[AttentionParts]:
    """Return what stands around each of these attention layers. Their modules run once, each on a few tokens.

    max_model_len: the longest text, tokens
    """
    found = {
        str(child.layer_name): (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if hasattr(child, "layer_name")
    }
    passed = PassedEmbeddings(model, max_model_len)
    parts = [_parts_of(*found[name], model, passed) if name in found else _nowhere() for name in layer_names]
    # layers that share a table share its description: what has the same one is scored together
    known: dict[tuple[Any, ...], Rotary] = {}
    return [replace(each, rotary=each.rotary and known.setdefault(_key(each.rotary), each.rotary)) for each in parts]


def _nowhere() -> AttentionParts:
    """Return what is known of a layer that no module of the model holds."""
    faults = dict.fromkeys((Need.ROTARY, Need.OUTPUT_PROJECTION), "no module of the model holds it")
    return AttentionParts(None, None, None, faults)


def _key(rotary: Rotary) -> tuple[Any, ...]:
    return rotary.cos_sin.data_ptr(), rotary.cos_sin.shape, rotary.is_neox_style


def _parts_of(
    module: nn.Module, name: str, attention: Any, model: nn.Module, passed: PassedEmbeddings
) -> AttentionParts:
    try:
        hidden_size = int(model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]
        trial = _tried(module, name, attention, hidden_size, passed)
        candidates = itertools.chain(passed.rotaries(module), _rotaries(module))
        rotary = next((each for each in candidates if trial.is_rotated_by(each)), None)
    except Exception as error:  # any module may do anything when it runs alone
        fault = f"the module around it cannot be run alone ({type(error).__name__}: {error})"
        return AttentionParts(attention, None, None, {Need.ROTARY: fault, Need.OUTPUT_PROJECTION: fault})
    faults = {}
    if rotary is None:
        faults[Need.ROTARY] = "its keys are not what a rotary embedding alone makes of them"
    if trial.projection is None:
        faults[Need.OUTPUT_PROJECTION] = "what attention returns is changed before it is projected"
    return AttentionParts(attention, rotary, trial.projection, faults)


@dataclass(frozen=True)
class _Trial:
    """What a module handed to its attention layer for one token at several positions, and who was given the result.

    positions:  [num_tokens] int64
    query, key: [num_heads, num_tokens, head_size] float32; no key where the layer reads those of another
    tolerance:  what rounding may change
    projection: the linear layer
    """

    positions: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor | None
    tolerance: float
    projection: Any

    def is_rotated_by(self, rotary: Rotary) -> bool:
        """Whether a rotary embedding is all that tells the tokens apart; queries may be scaled by position besides."""
        if int(self.positions.max()) >= len(rotary.cos_sin) or rotary.cos_sin.shape[1] > self.query.shape[-1]:
            return False
        if rotary.cos_sin[0].chunk(2)[1].any():  # of other positions: it would tell them apart as well
            return False
        query = rotary.unrotate(self.query, self.positions)
        parts = [query / query.norm(dim=-1, keepdim=True)]
        if self.key is not None:
            parts.append(rotary.unrotate(self.key, self.positions))
        return all(bool((x - x[:, :1]).abs().max() <= self.tolerance * x.abs().max().clamp(min=1e-6)) for x in parts)


def _tried(module: nn.Module, name: str, attention: Any, hidden_size: int, passed: PassedEmbeddings) -> _Trial:
    """Run a module with a recorder in place of its attention layer."""
    parameter = next(module.parameters())
    dtype, device = attention.dtype, parameter.device
    positions = torch.tensor([place for place in _POSITIONS if place < passed.max_model_len], device=device)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(hidden_size, generator=generator).to(device, dtype).expand(len(positions), -1).contiguous()
    returned = torch.randn(len(positions), attention.num_heads * attention.head_size_v, generator=generator)
    recorder = _Recorder(returned.to(device, dtype))
    arguments_of = passed.arguments if is_of_transformers(module) else _arguments
    with _in_place_of(module, name, recorder), _without_adapters(module), recorder.watching(module):
        module(**arguments_of(module, positions, hidden))
    is_shared = getattr(attention, "kv_sharing_target_layer_name", None) is not None
    if recorder.query is None or (recorder.key is None and not is_shared):
        raise ValueError("it hands no keys to its attention layer")

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(positions), -1, attention.head_size).transpose(0, 1).float()

    key = None if recorder.key is None else by_head(recorder.key)
    return _Trial(positions, by_head(recorder.query), key, _TOLERANCE[dtype], recorder.projection)


def _arguments(module: nn.Module, positions: torch.Tensor, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments of a module's forward. Raises ValueError if it wants others than positions and states."""
    given = dict.fromkeys(_ARGUMENTS["positions"], positions) | dict.fromkeys(_ARGUMENTS["hidden_states"], hidden)
    if unknown := _needed(module) - given.keys():
        raise ValueError(f"it asks for {', '.join(sorted(unknown))}")
    return {name: given[name] for name in inspect.signature(module.forward).parameters if name in given}


def _needed(module: nn.Module) -> set[str]:
    """Return the arguments that a module's forward asks for."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD}


class _Recorder(nn.Module):
    """Stands in for an attention layer: notes what it is given, and which linear layer is given what it returns."""

    def __init__(self, returned: torch.Tensor) -> None:
        super().__init__()
        self.returned = returned
        self.query: torch.Tensor | None = None
        self.key: torch.Tensor | None = None
        self.projection: Any = None

    def forward(self, query: torch.Tensor, key: torch.Tensor | None, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.query, self.key = query, key
        return self.returned

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Look at what the linear layers of a module are given."""
        linears = [child for child in module.modules() if hasattr(child, "quant_method")]
        handles = [child.register_forward_pre_hook(self._look, with_kwargs=True) for child in linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for given in (*args, *kwargs.values()):
            if self.query is not None and isinstance(given, torch.Tensor) and _is_same(given, self.returned):
                self.projection = linear


def _is_same(given: torch.Tensor, returned: torch.Tensor) -> bool:
    return given.numel() == returned.numel() and torch.equal(given.reshape(returned.shape), returned)


@contextmanager
def _in_place_of(module: nn.Module, name: str, other: nn.Module) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _without_adapters(module: nn.Module) -> Iterator[None]:
    """Linear layers inside a module go without LoRA, whose wrappers run in a batch only."""
    wrapped = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, BaseLayerWithLoRA)
    ]
    for parent, name, child in wrapped:
        setattr(parent, name, child.base_layer)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)


def _rotaries(module: nn.Module) -> Iterator[Rotary]:
    """Return what may rotate the keys of a module: every table inside it, and nothing."""
    for child in module.modules():
        tables = [table for name, table in child.named_buffers(recurse=False) if "cos_sin" in name and table.dim() == 2]
        is_neox_style = bool(getattr(child, "is_neox_style", True))
        for table in tables:
            # LongRoPE's has the one for short contexts first
            first = getattr(child, "original_max_position_embeddings", None)
            parts = [table] if first is None else [table[:first], table[first:]]
            yield from (Rotary(part, is_neox_style) for part in parts)
    yield _nothing(next(module.parameters()).device)


_nothing = functools.cache(Rotary.none)
