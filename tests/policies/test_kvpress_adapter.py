"""Presses of kvpress as policies: the same scores as kvpress's own, and the others refused with the reason."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

from tests.llama_layer import make_llama_layer
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.policies import POLICIES, kvpress_adapter

pytest.importorskip("kvpress", reason="kvpress, or `datasets` or `fire`, which it imports, is not installed")

import kvpress

RUN = {
    "CURPress": 0,
    "KeyDiffPress": 0,
    "KnormPress": 0,
    "LagKVPress": 0,
    "RandomPress": 0,
    "SnapKVPress": 64,
    "StreamingLLMPress": 0,
    "TOVAPress": 1,
}  # and the last queries that each of them reads
WHOLE_PROMPT = "it needs the hidden states"
REFUSED = {
    "CapPress": "it needs 'rotary_emb' of the attention layer",
    "CompactorPress": WHOLE_PROMPT,
    "CriticalKVPress": "it reads the whole model first",
    "ExpectedAttentionPress": "it needs 'rotary_emb' of the attention layer",
    "ExpectedAttentionStatsPress": "it reads the whole model first",
    "KVzapPress": "it reads the whole model first",
    "LeverageScorePress": WHOLE_PROMPT,
    "NonCausalAttnPress": WHOLE_PROMPT,
    "ObservedAttentionPress": "Set attn_implementation",
    "PyramidKVPress": "it chooses tokens by itself, in its own compress",
    "QFilterPress": "it reads the whole model first",
}


def exported(base: type) -> list[str]:
    classes = {name: getattr(kvpress, name) for name in kvpress.__all__}
    return sorted(n for n, c in classes.items() if isinstance(c, type) and issubclass(c, base) and c is not base)


def test_every_press_that_scores_either_runs_or_is_refused() -> None:
    assert exported(kvpress.ScorerPress) == sorted([*RUN, *REFUSED])


@pytest.mark.parametrize("name", RUN)
def test_a_press_that_runs_says_what_it_needs(name: str) -> None:
    policy = POLICIES.get(f"kvpress:{name}")()
    assert policy.query_window == policy.num_recent == RUN[name]
    assert policy.num_sink == 0 and not policy.needs and policy.default_allocator == "uniform"
    assert policy.query_aware == (RUN[name] > 0)
    assert type(policy).name == f"kvpress:{name}" and type(policy) is POLICIES.get(f"kvpress:{name}")


@pytest.mark.parametrize("name", REFUSED)
def test_a_press_that_needs_more_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError) as error:
        EvictionConfig.parse({"policy": f"kvpress:{name}", "budget": 128})
    message = str(error.value)
    assert f"kvpress:{name} cannot be a policy: " in message and REFUSED[name] in message
    assert ". Use " in message and "\n" not in message
    instead = re.findall(r"the policy '(\w+)'", message)
    assert all(policy in POLICIES.names() for policy in instead)


@pytest.mark.parametrize(
    "name", sorted({*exported(kvpress.BasePress)} - {*exported(kvpress.ScorerPress), "ScorerPress"})
)
def test_what_is_no_scorer_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"kvpress:{name} cannot be a policy: it is no ScorerPress"):
        POLICIES.get(f"kvpress:{name}")


@pytest.mark.parametrize("num_tokens", [130, 333, 1000])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SnapKVPress", {}),
        ("SnapKVPress", {"window_size": 16}),
        ("SnapKVPress", {"window_size": 5, "kernel_size": 9}),
        ("TOVAPress", {}),
        ("KnormPress", {}),
        ("KeyDiffPress", {}),
        ("CURPress", {}),
        ("CURPress", {"leverage_type": "kv_avg", "local_window_size": 8, "num_sinks": 0}),
        ("LagKVPress", {}),
        ("LagKVPress", {"lag_size": 32, "cross_scoring": True}),
        ("RandomPress", {"seed": 7}),
    ],
)
def test_scores_are_those_of_the_press_on_the_true_layer(name: str, options: dict[str, Any], num_tokens: int) -> None:
    layer = make_llama_layer(num_tokens, seed=1)
    policy = POLICIES.get(f"kvpress:{name}")(**options)
    with torch.no_grad():
        theirs = getattr(kvpress, name)(**options).score(*layer.press_arguments())[0]
    scores = policy.score(layer.inputs(policy))
    assert scores.dtype == torch.float32
    # the queries went through another layout on their way; logits are a few tens
    torch.testing.assert_close(scores, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("num_kept", [5, 64, 200, 332])
def test_a_press_knows_how_much_will_be_kept(num_kept: int) -> None:
    """StreamingLLM's scores say what its compression ratio leaves: the sinks and the most recent tokens."""
    layer = make_llama_layer(333, seed=0)
    policy = POLICIES.get("kvpress:StreamingLLMPress")(n_sink=3)
    scores = policy.score(replace(layer.inputs(policy), num_kept=num_kept))
    kept = torch.zeros(333)
    kept[:3] = kept[333 - (num_kept - 3) :] = 1
    assert scores.equal(kept.expand(2, -1))


def test_queries_are_scaled_so_that_attention_is_the_model_s_own() -> None:
    """SnapKVPress divides by the square root of the head size, whatever the model does."""
    layer = make_llama_layer(200, seed=0)
    policy = POLICIES.get("kvpress:SnapKVPress")()
    inputs = layer.inputs(policy)
    weaker = replace(inputs, query=inputs.query * 2, scale=inputs.scale / 2)
    torch.testing.assert_close(policy.score(weaker), policy.score(inputs), rtol=1e-4, atol=1e-7)
    assert not policy.score(replace(inputs, scale=inputs.scale / 2)).allclose(policy.score(inputs))


def test_random_numbers_are_the_same_every_time_and_those_of_others_go_on() -> None:
    layer = make_llama_layer(100, seed=0)
    for name, options in (("RandomPress", {}), ("CURPress", {"use_random_leverage": True})):
        policy = POLICIES.get(f"kvpress:{name}")(**options)
        state = torch.random.get_rng_state()
        first = policy.score(layer.inputs(policy))
        assert torch.random.get_rng_state().equal(state)
        torch.rand(3)
        assert policy.score(layer.inputs(policy)).equal(first)


@pytest.mark.parametrize("kv_len", [1, 63, 64])
def test_prompts_no_longer_than_the_window(kv_len: int) -> None:
    policy = POLICIES.get("kvpress:SnapKVPress")()
    assert policy.score(make_llama_layer(kv_len, seed=0).inputs(policy)).equal(torch.zeros(2, kv_len))


def test_options_are_the_press_s_own_and_pass_through() -> None:
    values = {"policy": "kvpress:SnapKVPress", "budget": 96, "policy_options": {"window_size": 16, "kernel_size": 3}}
    policy = EvictionConfig.parse(values).method().policy
    assert [f.name for f in fields(policy)] == ["window_size", "kernel_size"]
    assert policy.query_window == 16 and repr(policy) == "SnapKVPress(window_size=16, kernel_size=3)"
    for option in ("compression_ratio", "window"):
        with pytest.raises(ValueError, match=f"takes window_size, kernel_size; got '{option}'"):
            EvictionConfig.parse({**values, "policy_options": {option: 0.5}})
    with pytest.raises(ValueError, match="kv_budget: expected at least 33 tokens"):
        EvictionConfig.parse({**values, "budget": 32, "num_recent": 33}).check_block_size(32)


@pytest.mark.parametrize("options", [{"window_size": "many"}, {"window_size": -1}, {"kernel_size": 0}])
def test_wrong_options_are_one_sentence(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="kvpress:SnapKVPress") as error:
        EvictionConfig.parse({"policy": "kvpress:SnapKVPress", "budget": 96, "policy_options": options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "kvpress:KnormPres",
            "unknown press 'kvpress:KnormPres'. Did you mean 'KnormPress'? Available in kvpress: CURP",
        ),
        ("kvpress:xyz", "unknown press 'kvpress:xyz'. Available in kvpress: CURPress, CapPress"),
        ("kvpress:no_such_module:X", "needs the module no_such_module, which cannot be imported"),
        (f"kvpress:{__name__}:Missing", "Available in"),
        ("kvpress:", "unknown eviction policy 'kvpress:'"),
        ("kvpres:KnormPress", "Available: "),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EvictionConfig.parse({"policy": name, "budget": 96})


def test_without_kvpress_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ValueError, match=r"kvpress:NoSuch needs the module kvpress, .*pip install --no-deps kvpress"):
        POLICIES.get("kvpress:NoSuch")


def test_kvpress_is_imported_for_such_a_name_only() -> None:
    code = "import sys, vllm_kvevict.policies as p; p.POLICIES.get('snapkv')(); print('kvpress' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_names_of_the_family_are_choices_but_not_listed() -> None:
    POLICIES.get("kvpress:KnormPress")
    assert not [name for name in POLICIES.names() if name.startswith("kvpress")]
    assert "kvpress:KnormPress" in POLICIES and "kvpress" not in POLICIES and "kvpress:" not in POLICIES
    assert list(POLICIES) == POLICIES.names() and POLICIES.listing().endswith(", kvpress:NAME")


# A researcher's own presses, found by module path.


@dataclass
class LastKeys(kvpress.ScorerPress):
    """Likeness to the mean of the last queries, whose number is not called ``window_size``."""

    score_last: int = 8

    def score(self, module, hidden_states, keys, values, attentions, kwargs):  # type: ignore[no-untyped-def]
        queries = kvpress.presses.snapkv_press.get_prerope_query_states(module, hidden_states[:, -self.score_last :])
        groups = queries.unflatten(1, (keys.shape[1], -1)).mean((2, 3))
        return (keys * groups[:, :, None]).sum(-1)


@dataclass
class ByLayer(kvpress.ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):  # type: ignore[no-untyped-def]
        return keys.norm(dim=-1) * (1 if module.layer_idx else -1)


@dataclass
class HidesNan(kvpress.ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):  # type: ignore[no-untyped-def]
        return hidden_states.nan_to_num(0).sum(-1)[:, None].expand(-1, keys.shape[1], -1)


@dataclass
class ReadsHiddenStates(kvpress.ScorerPress):
    """Those of the last tokens, not their queries."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):  # type: ignore[no-untyped-def]
        return keys.norm(dim=-1) + hidden_states[:, None, -1:].norm(dim=-1)


@dataclass
class TurnsKeysBack(kvpress.ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):  # type: ignore[no-untyped-def]
        cos, sin = (table[:, None] for table in kwargs["position_embeddings"])
        first, second = keys.chunk(2, dim=-1)
        return (keys * cos - torch.cat([-second, first], dim=-1) * sin).sum(-1)


@dataclass
class WrongShape(kvpress.ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):  # type: ignore[no-untyped-def]
        return keys.norm(dim=-1)[..., :-1]


@dataclass
class NamesASink(kvpress.ScorerPress):
    num_sink: int = 4


@dataclass
class FailsWhenShort(kvpress.ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):  # type: ignore[no-untyped-def]
        assert keys.shape[2] > 100, "too short"
        keys.mul_(0)
        return values.norm(dim=-1)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name by which this module can be imported."""
    monkeypatch.setitem(sys.modules, "my_presses", sys.modules[__name__])
    assert importlib.import_module("my_presses").LastKeys is LastKeys
    return "kvpress:my_presses"


def test_a_press_of_another_module(here: str) -> None:
    layer = make_llama_layer(200, seed=0)
    policy = EvictionConfig.parse({"policy": f"{here}:LastKeys", "budget": 64}).method().policy
    assert policy.query_window == 8
    queries = layer.query[-8:].unflatten(1, (2, -1)).mean((0, 2))
    expected = torch.einsum("hkd,hd->hk", layer.keys, queries)
    torch.testing.assert_close(policy.score(layer.inputs(policy)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("press", "reason"),
    [
        ("ByLayer", "or to know its layer"),
        ("HidesNan", "it needs the hidden states or positions of the whole prompt"),
        ("ReadsHiddenStates", "it needs the hidden states or positions of the whole prompt"),
        ("TurnsKeysBack", "it needs the hidden states or positions of the whole prompt"),
        ("WrongShape", "scores: expected shape"),
        ("NamesASink", "its field 'num_sink' has the name of an attribute of every policy"),
    ],
)
def test_presses_that_would_be_wrong_are_refused(here: str, press: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"kvpress:my_presses:{press} cannot be a policy: .*{reason}"):
        EvictionConfig.parse({"policy": f"{here}:{press}", "budget": 64})


def test_a_press_that_fails_later_says_so_and_changes_no_cache(here: str) -> None:
    policy = POLICIES.get(f"{here}:FailsWhenShort")()
    inputs = make_llama_layer(150, seed=0).inputs(policy)
    before = inputs.keys.clone()
    assert policy.score(inputs).isfinite().all()
    torch.testing.assert_close(inputs.keys, before, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="FailsWhenShort failed on a prompt of 90 tokens: AssertionError: too short"):
        policy.score(make_llama_layer(90, seed=0).inputs(policy))


def test_a_request_does_not_choose_what_the_server_imports(here: str) -> None:
    config = EvictionConfig.parse({"policy": f"{here}:LastKeys", "budget": 64})
    assert config.for_request({"kv_eviction": f"{here}:LastKeys", "kv_budget": 96}, 32) is not None
    for press in ("kvpress:KnormPress", f"{here}:FailsWhenShort", "kvpress:antigravity:X", "kvpress::", ":"):
        with pytest.raises(ValueError, match="kv_eviction: a request may name a press only if the server") as error:
            config.for_request({"kv_eviction": press}, 32)
        assert str(error.value).endswith("Give it to --kv-eviction, or to the policies of --kv-request-options")
    assert "antigravity" not in sys.modules


def test_presses_that_a_server_lists_are_made_when_it_starts(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {"policies": ["all", "none", "kvpress:KnormPress", f"{here}:LastKeys"]}
    config = EvictionConfig.parse({"policy": "snapkv", "budget": 64, "request_options": listed})
    monkeypatch.setattr(kvpress_adapter, "_needed_window", None)  # nothing is tried out from now on
    for press in listed["policies"][2:]:
        for budget in (64, 96):
            chosen = config.for_request({"kv_eviction": press, "kv_budget": budget}, 32)
            assert chosen is not None and chosen.method().policy is chosen.method().policy
    assert config.for_request({"kv_eviction": "lava"}, 32) is not None
    assert config.for_request({"kv_eviction": "none"}, 32) is None
    with pytest.raises(ValueError, match="kv_request_options: policies: kvpress:AdaKVPress cannot be a policy"):
        EvictionConfig.parse(
            {"policy": "snapkv", "budget": 64, "request_options": {"policies": ["kvpress:AdaKVPress"]}}
        )
