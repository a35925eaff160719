"""``kvpress:PRESS``: rank tokens with a press of kvpress, or with a press of your own.

``kvpress:KnormPress`` is a press that kvpress exports, ``kvpress:package.module:MyPress`` one of any module that can be
imported. A press runs if its ``score`` reads no more than keys, values and the queries of the last tokens; whether it
does is tried out when the policy is built. kvpress is imported when such a name is used, and never otherwise.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch

from vllm_kvevict.policies.base import POLICIES, EvictionPolicy
from vllm_kvevict.policies.inputs import ScoreInputs

MAX_WINDOW = 4096
# What to use for presses of kvpress that cannot run here.
INSTEAD = {
    "AdaKVPress": "the allocator 'adakv'",
    "ChunkKVPress": "the policy 'chunkkv'",
    "CompactorPress": "the policy 'compactor'",
    "CriticalAdaKVPress": "the policy 'criticalkv' and the allocator 'adakv'",
    "CriticalKVPress": "the policy 'criticalkv'",
    "ExpectedAttentionPress": "the policy 'expected_attention'",
    "ExpectedAttentionStatsPress": "the policy 'expected_attention'",
    "LeverageScorePress": "the policy 'compactor'",
    "NonCausalAttnPress": "the policy 'compactor'",
    "ObservedAttentionPress": "the policy 'h2o' with normalize",
    "PyramidKVPress": "the policy 'snapkv' and the allocator 'pyramid'",
}
# What a ScorerPress may override, and still be nothing but its score.
HOOKS = {
    "compress": "it chooses tokens by itself, in its own compress",
    "forward_hook": "it acts on the model by itself, in its own forward_hook",
    "post_init_from_model": "it reads the whole model first, in its own post_init_from_model",
}


@dataclass(frozen=True)
class PressPolicy(EvictionPolicy):
    """Score tokens by a press of kvpress, of which ``resolve`` makes subclasses whose options are the press's own.

    The press sees a stand-in of the attention layer: keys and values dense in float32, RoPE applied; its query
    projection returns the last queries, rotated already (so that cos is 1 and sin is 0) and scaled such that dividing
    by sqrt(head_size) is the model's own softmax scale; everything of earlier tokens but K and V is NaN. Nothing is
    carried from one layer to the next. The press's ``compression_ratio`` is the one that keeps ``num_kept`` tokens.

    The last queries are as many as the press needs, found by trying 0, 1 and every number among its options; they
    always stay. Random numbers come from a fixed seed: the same for every layer and request. What a press computes of
    attention knows neither sinks nor soft-capping of the model.

    Raises ValueError, when it is built, for a press that needs more.
    """

    press_class: ClassVar[Any]

    def __post_init__(self) -> None:
        options = {option.name: getattr(self, option.name) for option in fields(self)}
        try:
            press = self.press_class(**options)
        except Exception as error:  # whatever the press says about its options
            raise ValueError(f"{self.name}: {_said(error)}") from None
        object.__setattr__(self, "_press", press)
        object.__setattr__(self, "_window", _needed_window(self.name, press, options.values()))

    @property
    def query_window(self) -> int:
        window: int = self._window  # type: ignore[attr-defined]
        return window

    @property
    def num_recent(self) -> int:
        return self.query_window

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        num_kv_heads, kv_len = inputs.num_kv_heads, inputs.kv_len
        if kv_len <= self.query_window:  # every token observes: none is to be judged
            return inputs.query.new_zeros(num_kv_heads, kv_len, dtype=torch.float32)
        keys, values = _dense(inputs, inputs.gather_keys), _dense(inputs, inputs.gather_values)
        query = inputs.query[len(inputs.query) - self.query_window :]
        press = self._press  # type: ignore[attr-defined]
        try:
            return _press_scores(press, query, keys, values, inputs.scale, inputs.num_kept)
        except Exception as error:
            raise RuntimeError(f"{self.name} failed on a prompt of {kv_len} tokens: {_said(error)}") from error

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        # what the press is given, and its result; what it makes of them on the way comes on top and is not known
        rows = (num_heads + 2) * head_size if self.query_window else 0  # hidden states, cos and sin
        return 4 * (2 * num_kv_heads * head_size + rows + num_kv_heads)


def resolve(path: str) -> type[EvictionPolicy]:
    """Return the policy of a press: ``KnormPress`` of kvpress, or ``package.module:MyPress``.

    Raises ValueError, one sentence, if there is no such press or if it does more than score.
    """
    name = f"kvpress:{path}"
    module_name, _, class_name = path.rpartition(":")
    kvpress = _imported("kvpress", name, "run pip install datasets fire, then pip install --no-deps kvpress")
    module = _imported(module_name, name, "put its folder on PYTHONPATH") if module_name else kvpress
    press_class = getattr(module, class_name, None)
    if not isinstance(press_class, type):
        raise ValueError(_unknown(name, class_name, module, kvpress.ScorerPress))
    if not issubclass(press_class, kvpress.ScorerPress):
        raise _refusal(name, class_name, "it is no ScorerPress but compresses in its own way")
    for hook, reason in HOOKS.items():
        if getattr(press_class, hook) is not getattr(kvpress.ScorerPress, hook):
            raise _refusal(name, class_name, reason)
    options = list(_options(press_class))
    clash = [option[0] for option in options if hasattr(EvictionPolicy, option[0]) or option[0] == "name"]
    if clash:
        raise _refusal(
            name, class_name, f"its field {clash[0]!r} has the name of an attribute of every policy; rename it"
        )
    paper = f"{press_class.__module__}.{press_class.__qualname__}"
    namespace = {"press_class": press_class, "name": name, "paper": paper, "__module__": __name__}
    return make_dataclass(class_name, options, bases=(PressPolicy,), frozen=True, namespace=namespace)


def _options(press_class: type) -> Iterable[tuple[Any, ...]]:
    """Yield what ``make_dataclass`` takes for each argument of the press but its compression ratio."""
    factories = {f.name: f.default_factory for f in fields(press_class)} if is_dataclass(press_class) else {}
    for name, parameter in inspect.signature(press_class).parameters.items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if name == "compression_ratio" or name.startswith("_") or variadic:
            continue
        if callable(factory := factories.get(name)):
            yield name, Any, field(default_factory=factory)
        elif parameter.default is parameter.empty:
            yield name, Any
        else:
            yield name, Any, field(default=parameter.default)


def _needed_window(name: str, press: Any, options: Iterable[Any]) -> int:
    """Return how many last queries the press reads: the fewest at which its scores depend on nothing else.

    Raises ValueError if there is no such number.
    """
    numbers = {value for value in options if type(value) is int and 0 < value <= MAX_WINDOW}
    reason = ""
    for window in sorted({0, 1, *numbers}):
        try:
            if _reads_no_more_than(window, press, max(numbers, default=0)):
                return window
            reason = "it needs the hidden states or positions of the whole prompt, or to know its layer"
        except Exception as error:  # any: the press is not ours
            reason = _said(error)
    raise _refusal(name, type(press).__name__, reason)


@dataclass(frozen=True)
class _Disguise:
    """What no score may depend on, since the engine does not know it or the press should not look at it.

    unknown:   fills what is not known of the tokens before the window
    layer_idx: number of the layer
    encoding:  the hidden states of the window are the queries times this; the query projection divides by it
    """

    unknown: float = math.nan
    layer_idx: int = 0
    encoding: float = 1.0


def _reads_no_more_than(window: int, press: Any, largest: int) -> bool:
    """Whether the scores of a random layer are numbers, and the same in another disguise.

    largest: the largest number among the press's options; the prompt is longer than twice that
    """
    num_tokens, num_kv_heads, group, head_size = 2 * max(largest, 128) + 41, 2, 2, 16
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, num_kv_heads, num_tokens, head_size, generator=generator)
    query = torch.randn(num_tokens, num_kv_heads * group, head_size, generator=generator)[num_tokens - window :]

    def scores(disguise: _Disguise) -> torch.Tensor:
        given = query, keys.clone(), values.clone()
        return _press_scores(press, *given, head_size**-0.5, num_tokens // 2, disguise)

    first = scores(_Disguise())
    # a power of 2 rounds nothing
    return not first.isnan().any() and first.equal(scores(_Disguise(unknown=0.5, layer_idx=1, encoding=-4.0)))


@torch.no_grad()
def _press_scores(
    press: Any,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    num_kept: int | None,
    disguise: _Disguise = _Disguise(),
) -> torch.Tensor:
    """Return [num_kv_heads, num_tokens] float32, what the press makes of one layer.

    query:        [window, num_heads, head_size] of the last tokens, RoPE applied
    keys, values: [num_kv_heads, num_tokens, head_size] float32; the press may overwrite them

    Raises ValueError if the scores have another shape; and whatever the press raises.
    """
    num_kv_heads, num_tokens, head_size = keys.shape
    press = copy.copy(press)
    kept = num_tokens if num_kept is None else num_kept
    press.compression_ratio = max(1 - (kept + 0.5) / num_tokens, 0.0)  # the half: int() then gives ``kept``
    encoded = query.float() * (scale * math.sqrt(head_size) * disguise.encoding)

    def rows(of_window: torch.Tensor) -> torch.Tensor:
        return _rows(of_window, num_tokens, disguise.unknown)

    layer = _layer(query.shape[1], num_kv_heads, head_size, disguise)
    cos_sin = rows(keys.new_ones(len(query), head_size)), rows(keys.new_zeros(len(query), head_size))
    hidden_states, kwargs = rows(encoded.flatten(1)), {"position_embeddings": cos_sin}
    with torch.random.fork_rng([keys.device] if keys.is_cuda else []):
        torch.manual_seed(0)
        scores = press.score(layer, hidden_states, keys[None], values[None], None, kwargs)
    if scores.shape != (1, num_kv_heads, num_tokens):
        raise ValueError(f"scores: expected shape {(1, num_kv_heads, num_tokens)}, got {tuple(scores.shape)}")
    result: torch.Tensor = scores[0].float()
    return result


def _rows(of_window: torch.Tensor, num_tokens: int, unknown: float) -> torch.Tensor:
    """Return [1, num_tokens, width]: ``of_window`` [window, width] in the last rows, ``unknown`` in all others."""
    window, width = of_window.shape
    if window == 0:
        return of_window.new_full((1, 1, 1), unknown).expand(1, num_tokens, width)
    rows = of_window.new_full((1, num_tokens, width), unknown)
    rows[0, num_tokens - window :] = of_window
    return rows


class _StandIn(SimpleNamespace):
    """An attention layer, or its config, of which only some attributes are known."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"it needs {name!r} of the attention layer")


def _layer(num_heads: int, num_kv_heads: int, head_size: int, disguise: _Disguise) -> _StandIn:
    sizes = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_size}
    return _StandIn(
        config=_StandIn(**sizes),
        head_dim=head_size,
        num_key_value_groups=num_heads // num_kv_heads,
        layer_idx=disguise.layer_idx,
        scaling=head_size**-0.5,
        q_proj=lambda hidden_states: hidden_states / disguise.encoding,
        k_proj=_no_key_projection,
    )


def _no_key_projection(hidden_states: torch.Tensor) -> torch.Tensor:
    raise ValueError("it needs the hidden states of the whole prompt, to project them to keys")


def _dense(inputs: ScoreInputs, gather: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """Return [num_kv_heads, kv_len, head_size] float32, gathered tile by tile so that there is no second copy."""
    dense = inputs.keys.new_empty(inputs.num_kv_heads, inputs.kv_len, inputs.keys.shape[-1], dtype=torch.float32)
    for start, end in inputs.tiles():
        dense[:, start:end] = gather(start, end)
    return dense


def _imported(module_name: str, name: str, remedy: str) -> ModuleType:
    try:
        return import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{name} needs the module {module_name}, which cannot be imported ({error}); {remedy}"
        ) from None


def _unknown(name: str, class_name: str, module: ModuleType, scorer_press: type) -> str:
    classes = {key: value for key, value in vars(module).items() if isinstance(value, type)}
    known = sorted(key for key, cls in classes.items() if issubclass(cls, scorer_press) and cls is not scorer_press)
    close = difflib.get_close_matches(class_name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown press {name!r}.{hint} Available in {module.__name__}: {', '.join(known) or 'none'}"


def _refusal(name: str, class_name: str, reason: str) -> ValueError:
    instead = INSTEAD.get(class_name, "a press that needs only keys, values and the last queries")
    return ValueError(
        f"{name} cannot be a policy: {reason}, and a policy of this family gets keys, values and the queries of the "
        f"last tokens only. Use {instead}"
    )


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


POLICIES.register_family("kvpress", resolve)
