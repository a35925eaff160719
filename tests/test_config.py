"""What a user may set, and that every refusal names the field, what was given and what is allowed."""

import json
import sys
import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.plan import plan_eviction
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.options.table import options_of_requests
from vllm_kvevict.policies import POLICIES, EvictionPolicy
from vllm_kvevict.policies.snapkv import SnapKV


@dataclass(frozen=True)
class SnapTwo(SnapKV):
    """A policy with other defaults, for requests that change theirs."""

    window: int = 8

    @property
    def num_sink(self) -> int:
        return 4


@dataclass(frozen=True)
class Tilted(Uniform):
    """An allocator that has an option."""

    slope: float = 0.5


@pytest.fixture(autouse=True)
def more_names(monkeypatch):
    monkeypatch.setitem(POLICIES._classes, "test-two", SnapTwo)
    monkeypatch.setitem(ALLOCATORS._classes, "test-tilted", Tilted)


def parse(**values):
    return EvictionConfig.parse({"policy": "snapkv", "budget": 1024, **values})


def refusal(**values):
    with pytest.raises(ValueError) as error:
        parse(**values)
    assert not isinstance(error.value, ValidationError)
    message = str(error.value)
    assert "\n" not in message
    return message


def request_refusal(config, **options):
    with pytest.raises(ValueError) as error:
        config.for_request(options, 16)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_policy_s():
    config = parse()
    assert config.allocator is None
    assert config.allocator_name == "uniform"
    assert config.method().policy == SnapKV()
    assert config.method().allocator == Uniform()
    assert (config.method().num_sink, config.method().num_recent) == (0, 32)
    assert config.method().num_protected == 32


def test_lava_brings_its_own_allocator_and_each_half_goes_alone():
    assert parse(policy="lava").allocator_name == "lava"
    assert parse(policy="lava", allocator="uniform").allocator_name == "uniform"
    assert parse(policy="snapkv", allocator="lava").allocator_name == "lava"
    assert type(parse(policy="lava").method().allocator).__module__ == "vllm_kvevict.budgets.lava"


def test_every_field_reaches_the_method():
    config = parse(
        allocator="test-tilted",
        num_sink=3,
        num_recent=0,
        policy_options={"window": 64, "pool": "avg"},
        allocator_options={"slope": 0.25},
    )
    method = config.method()
    assert method.policy == SnapKV(window=64, pool="avg")
    assert method.allocator == Tilted(slope=0.25)
    assert (method.num_sink, method.num_recent) == (3, 0)


@pytest.mark.parametrize("budget", [1, 2048, 2**40, 0.5, 1e-9, 1 - 1e-9])
def test_budgets_that_are_allowed(budget):
    parsed = parse(budget=budget).budget
    assert parsed == budget
    assert type(parsed) is type(budget)


@pytest.mark.parametrize(
    "budget", [True, False, "1024", "0.5", 0, -1, -0.5, 0.0, 1.0, 1.5, 2048.0, None, [512], float("nan"), float("inf")]
)
def test_budgets_that_are_not(budget):
    expected = "kv_budget: expected a whole number of tokens of at least 1, a fraction between 0 and 1, or 'auto'"
    assert refusal(budget=budget) == f"{expected}, got {budget!r}"


@pytest.mark.parametrize("field", ["num_sink", "num_recent"])
@pytest.mark.parametrize("value", [-1, 1.0, "4", True, [1]])
def test_protections_that_are_not_allowed(field, value):
    expected = f"kv_eviction.{field}: expected a whole number of tokens of at least 0, got {value!r}"
    assert refusal(**{field: value}) == expected


@pytest.mark.parametrize("value", [1, "yes", None])
def test_logging_is_on_or_off(value):
    assert refusal(log_requests=value) == f"kv_eviction_log_requests: expected true or false, got {value!r}"


@pytest.mark.parametrize("value", [1, "yes"])
@pytest.mark.parametrize("field", ["during_decode", "during_prefill"])
def test_later_evictions_are_on_or_off(field, value):
    assert refusal(**{field: value}) == f"kv_evict_{field}: expected true or false, got {value!r}"


def test_a_policy_says_whether_it_evicts_during_decode():
    assert not parse().method().schedule.evicts_answer
    assert parse(policy="morphkv").method().schedule.evicts_answer
    assert not parse(policy="morphkv", during_decode=False).method().schedule.evicts_answer


@pytest.mark.parametrize("policy", ["compactor", "expected_attention", "obcache_k"])
@pytest.mark.parametrize("field", ["during_decode", "during_prefill"])
def test_policies_that_rank_a_whole_prompt_evict_once(field, policy):
    message = refusal(policy=policy, **{field: True})
    assert message.startswith(f"kv_evict_{field}: policy {policy!r} ranks the tokens of a whole prompt, once;")
    assert "h2o" in refusal(policy="h2o", policy_options={"normalize": True}, during_decode=True)


@pytest.mark.parametrize("field", ["during_decode", "during_prefill"])
def test_what_is_evicted_again_keeps_the_observed_tokens(field):
    assert parse(num_recent=0).method().num_recent == 0
    assert parse(num_recent=0, **{field: True}).method().num_recent == 32
    assert parse(num_recent=50, **{field: True}).method().num_recent == 50


@pytest.mark.parametrize("field", ["during_decode", "during_prefill"])
def test_what_is_evicted_again_needs_one_more_block(field):
    parse(budget=33).check_block_size(32)
    parse(budget=33, **{field: True}).check_block_size(32)
    parse(budget=64, num_sink=1).check_block_size(32)
    with pytest.raises(ValueError, match="expected at least 65 tokens") as error:
        parse(budget=64, num_sink=1, **{field: True}).check_block_size(32)
    assert "beside the block that new tokens fill. " in str(error.value)


@pytest.mark.parametrize("value", [0, -1, True, "1", 1.0])
def test_intervals_are_numbers_of_tokens(value):
    message = refusal(policy="tova", during_decode=True, interval=value)
    assert message == f"kv_evict_interval: expected 1 or the size of a block, in tokens, got {value!r}"


def test_an_interval_is_one_token_or_one_block():
    for interval in (None, 1, 32):
        config = parse(policy="morphkv", budget=128, interval=interval)
        config.check_block_size(32)
        assert config.method().schedule.per_token == (interval == 1)
    with pytest.raises(ValueError) as error:
        parse(policy="morphkv", budget=128, interval=16).check_block_size(32)
    assert str(error.value) == "kv_evict_interval: expected 1 or the size of a block (32), got 16"


def test_an_interval_is_for_policies_that_evict_answers_token_by_token():
    message = refusal(policy="tova", interval=1)
    assert message.startswith("kv_evict_interval: counts tokens of the answer, and policy 'tova' does not evict")
    message = refusal(policy="lava", during_decode=True, interval=1)
    assert message.startswith("kv_evict_interval: policy 'lava' evicts from an answer a block at a time;")
    assert message.endswith("or choose one of h2o, morphkv, streaming_llm, tova")


def test_of_a_full_budget_one_token_may_go():
    parse(policy="tova", budget=33, during_decode=True, interval=1, num_recent=31).check_block_size(32)
    with pytest.raises(ValueError, match="expected at least 65 tokens"):
        parse(policy="tova", budget=64, during_decode=True, interval=1, num_recent=32).check_block_size(32)


def test_the_server_s_interval_is_for_its_own_policy():
    server = parse(policy="morphkv", budget=128, interval=1)
    assert server.for_request({}, 32).method().schedule.per_token
    assert server.for_request({"kv_budget": 256}, 32).method().schedule.per_token
    assert not server.for_request({"kv_eviction": "snapkv"}, 32).method().schedule.per_token
    assert not server.for_request({"kv_evict_during_decode": 0}, 32).method().schedule.per_token
    options = {"kv_eviction": "h2o", "kv_evict_during_decode": 1, "kv_evict_interval": 1}
    assert server.for_request(options, 32).method().schedule.per_token
    assert not parse(policy="morphkv").for_request({"kv_evict_interval": 32}, 32).method().schedule.per_token
    assert request_refusal(server, kv_evict_interval=7).startswith("kv_evict_interval: expected 1 or the size of a bl")


@pytest.mark.parametrize(("field", "flag"), [("policy", "kv_eviction"), ("allocator", "kv_budget_allocator")])
@pytest.mark.parametrize("value", [False, 5, ["snapkv"]])
def test_names_must_be_text(field, flag, value):
    message = refusal(**{field: value})
    assert message.startswith(f"{flag}: expected")
    assert "the name of a" in message
    assert message.endswith(f"got {value!r}")


@pytest.mark.parametrize("field", ["policy_options", "allocator_options"])
@pytest.mark.parametrize("value", [None, 5, "window=64", [1]])
def test_options_must_be_a_mapping(field, value):
    message = refusal(**{field: value})
    assert field in message
    assert "expected a mapping of names to values" in message
    assert message.endswith(f"got {value!r}")


def test_unknown_policy_gets_a_suggestion():
    message = refusal(policy="snapvk")
    assert "policy" in message
    assert f"'snapvk'. Did you mean 'snapkv'? Available: {', '.join(POLICIES.names())}" in message


def test_unknown_allocator_gets_a_suggestion():
    message = refusal(allocator="unifrom")
    assert "allocator" in message
    assert f"'unifrom'. Did you mean 'uniform'? Available: {', '.join(ALLOCATORS.names())}" in message


@pytest.mark.parametrize("key", ["budgets", "window", "Policy", ""])
def test_unknown_fields_are_listed_against_the_known_ones(key):
    message = refusal(**{key: 1})
    assert f"unknown field {key!r}" in message
    assert all(field in message for field in EvictionConfig.model_fields)


@pytest.mark.parametrize("missing", ["policy", "budget"])
def test_missing_fields_name_the_flags(missing):
    values = {"policy": "snapkv", "budget": 8}
    del values[missing]
    with pytest.raises(ValueError, match=f"kv_eviction: '{missing}' is missing. Give --kv-eviction .* --kv-budget"):
        EvictionConfig.parse(values)


def test_unknown_options_of_a_policy():
    message = refusal(policy_options={"windows": 64})
    takes = "policy_options: eviction policy 'snapkv' takes window, pool_kernel, pool, group"
    assert message == f"{takes}; got 'windows'. Did you mean 'window'?"
    assert refusal(policy_options={"q": 64}) == f"{takes}; got 'q'"


def test_options_that_must_be_given():
    expected = "kv_budget_allocator: budget allocator 'fixed' needs 'file', which is given when the server starts, in"
    with pytest.raises(ValueError, match=expected):
        EvictionConfig.parse({"policy": "snapkv", "budget": 64, "allocator": "fixed"})


def test_a_class_that_lacks_a_method_is_named_with_it(monkeypatch):
    @dataclass(frozen=True)
    class Unfinished(EvictionPolicy):
        def score(self, inputs):
            return inputs.query

    monkeypatch.setitem(POLICIES._classes, "unfinished", Unfinished)
    with pytest.raises(ValueError, match="kv_eviction: eviction policy 'unfinished' has no scratch_bytes"):
        EvictionConfig.parse({"policy": "unfinished", "budget": 64})


def test_a_broken_package_spoils_no_refusal_of_others(monkeypatch):
    class Broken:
        def load(self):
            sys.exit("a dependency is missing")

    monkeypatch.setattr(POLICIES, "_entry_points", {"broken": Broken()})
    monkeypatch.setattr(POLICIES, "_broken", {})
    message = "choose one of h2o, morphkv, streaming_llm, tova"
    with pytest.raises(ValueError, match=message):
        EvictionConfig.parse({"policy": "snapkv", "budget": 64, "during_decode": True, "interval": 1})


def test_unknown_options_of_an_allocator():
    assert refusal(allocator_options={"slope": 1}) == (
        "allocator_options: budget allocator 'uniform' takes no options; got 'slope'"
    )


@pytest.mark.parametrize(
    "option, value, allowed",
    [
        ("window", 0, "a whole number of at least 1"),
        ("window", "64", "a whole number of at least 1"),
        ("window", 64.5, "a whole number of at least 1"),
        ("pool_kernel", 4, "odd number"),
        ("pool_kernel", None, "odd number"),
        ("pool", "mode", "'max' or 'avg'"),
        ("group", 3, "'mean', 'max' or 'sum'"),
    ],
)
def test_wrong_values_of_options(option, value, allowed):
    message = refusal(policy_options={option: value})
    assert option in message
    assert allowed in message
    assert repr(value) in message


def test_frozen():
    config = parse()
    with pytest.raises(ValidationError, match="frozen"):
        config.budget = 5
    assert config.budget == 1024


def test_parse_leaves_its_argument_alone_and_shares_nothing():
    values = {"policy": "snapkv", "budget": 8, "policy_options": {"window": 4}}
    before = json.dumps(values)
    first, second = EvictionConfig.parse(values), parse()
    assert json.dumps(values) == before
    assert second.policy_options == {}
    assert first.policy_options is not second.policy_options


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"budget": 0.125},
        {"num_sink": 0, "num_recent": 64},
        {"policy_options": {"window": 64, "pool": "avg", "pool_kernel": 5, "group": "max"}},
        {"policy": "test-two", "allocator": "test-tilted", "allocator_options": {"slope": 2.0}},
    ],
)
@pytest.mark.parametrize("exclude_unset", [True, False])
def test_survives_json(values, exclude_unset):
    config = parse(**values)
    travelled = EvictionConfig.parse(json.loads(json.dumps(config.model_dump(exclude_unset=exclude_unset))))
    assert travelled == config
    assert travelled.method() == config.method()
    assert EvictionConfig.model_validate_json(config.model_dump_json()) == config


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    budget=st.integers(1, 400),
    num_recent=st.integers(0, 200),
    block_size=st.sampled_from([16, 32, 64]),
    tail=st.integers(0, 63),
)
def test_a_budget_that_passes_holds_the_protected_tokens(budget, num_recent, block_size, tail):
    """It is refused exactly if plans would have to keep more blocks than the budget asks for."""
    config = EvictionConfig.parse({"policy": "snapkv", "budget": budget, "num_recent": num_recent})
    plan = plan_eviction(4096 + tail, budget, block_size, max(num_recent, config.method().policy.query_window))
    assert plan is not None
    too_small = plan.num_kept_blocks * block_size >= budget + block_size
    if not too_small:
        config.check_block_size(block_size)
        return
    with pytest.raises(ValueError, match=rf"kv_budget: expected at least \d+ tokens, got {budget}: "):
        config.check_block_size(block_size)


@pytest.mark.parametrize("block_size, least", [(16, 33), (32, 33), (64, 65), (128, 129)])
def test_least_budget_by_block_size(block_size, least):
    """The tail may be a single token, so the other 31 protected ones need whole blocks before it."""
    parse(budget=least).check_block_size(block_size)
    with pytest.raises(ValueError) as error:
        parse(budget=least - 1).check_block_size(block_size)
    expected = f"kv_budget: expected at least {least} tokens, got {least - 1}: blocks hold {block_size}, and"
    assert expected in str(error.value)
    needs = (
        "needs 32 tokens in every head (32 protected, 32 observed), of which the prompt's last block may hold but one. "
    )
    assert needs in str(error.value)
    assert "num_sink" in str(error.value)
    assert "num_recent" in str(error.value)


def test_fractions_fit_every_block_size():
    parse(budget=1e-6).check_block_size(128)


@pytest.mark.parametrize("options", [None, {}, {"other": 5}, {"kv_eviction": "snapkv"}, {"kv_budget": None}])
def test_a_request_without_wishes_gets_the_server_s(options):
    config = parse(policy_options={"window": 16}, num_sink=2)
    assert config.for_request(options, 16) == config


def test_a_request_may_switch_eviction_off():
    assert parse().for_request({"kv_eviction": "none"}, 16) is None
    assert parse().for_request({"kv_eviction": "none", "kv_budget": 512}, 16) is None


def test_a_request_may_take_another_policy():
    config = parse(policy_options={"window": 16}, num_recent=10, allocator="test-tilted")
    changed = config.for_request({"kv_eviction": "test-two"}, 16)
    # the options were those of the server's policy
    assert changed == parse(policy="test-two", num_recent=10, allocator="test-tilted")
    assert (changed.method().num_sink, changed.method().num_recent) == (4, 10)
    assert config.policy == "snapkv"


def test_a_request_that_names_the_server_s_policy_keeps_its_options():
    config = parse(policy_options={"window": 16})
    assert config.for_request({"kv_eviction": "snapkv"}, 16) == config


@pytest.mark.parametrize("budget", [512, 0.25, 33])
def test_a_request_may_set_its_budget(budget):
    config = parse(policy_options={"pool": "avg"}, num_sink=1)
    changed = config.for_request({"kv_budget": budget}, 16)
    assert changed == parse(budget=budget, policy_options={"pool": "avg"}, num_sink=1)
    assert type(changed.budget) is type(budget)
    assert config.budget == 1024


@pytest.mark.parametrize("budget", [True, "512", "0.5", 0, -4, 1.0, 0.0, 700.0, [512]])
def test_wrong_budgets_of_requests(budget):
    expected = "kv_budget: expected a whole number of tokens of at least 1, a fraction between 0 and 1, or 'auto'"
    assert request_refusal(parse(), kv_budget=budget) == f"{expected}, got {budget!r}"


CALIBRATION = {"snapkv": {"alpha": 1.0, "beta": -9.0}}


def auto(**values):
    return parse(budget="auto", calibration=CALIBRATION, **values)


def test_a_chosen_budget():
    config = auto(budget_max=0.5, budget_target=0.8, num_sink=4)
    chosen = config.auto_budget()
    assert (chosen.target, chosen.least, chosen.most, chosen.min_tokens) == (0.8, 0.05, 0.5, 36)
    assert (chosen.calibration.alpha, chosen.calibration.beta) == (1.0, -9.0)
    assert config.most_kept == 0.5
    assert parse().auto_budget() is None
    assert parse().most_kept == 1024
    assert EvictionConfig.parse(json.loads(json.dumps(config.model_dump()))) == config


def test_a_request_may_have_its_budget_chosen():
    config = parse(calibration=CALIBRATION)
    changed = config.for_request({"kv_budget": "auto", "kv_budget_min": 0.2, "kv_budget_max": 0.4}, 16)
    assert changed == auto(budget_min=0.2, budget_max=0.4)
    assert auto().for_request({"kv_budget": 64}, 16).auto_budget() is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"calibration": {}}, "kv_budget: 'auto' needs a calibration of policy 'snapkv' (given: none); make one with"),
        ({"policy": "lava"}, "kv_budget: 'auto' needs a calibration of policy 'lava' (given: snapkv); make one with"),
        (
            {"calibration": {"snapkv": {"alpha": 1.0}}},
            "kv_budget_calibration: expected for each policy the numbers",
        ),
        ({"calibration": {"snapkv": {"alpha": "x", "beta": 1}}}, "kv_budget_calibration: expected for each policy"),
        (
            {"during_decode": True},
            "'auto' is chosen when all of a prompt is known, and does not go with kv_evict_during_decode",
        ),
        ({"during_prefill": True}, "does not go with kv_evict_during_prefill; give a number, or say"),
        ({"budget_min": 0.5, "budget_max": 0.2}, "kv_budget_min: expected at most kv_budget_max (0.2), got 0.5"),
        ({"budget_target": 1.0}, "kv_eviction.budget_target: expected a fraction between 0 and 1, got 1.0"),
        ({"budget_max": 0}, "kv_budget_max: expected a fraction between 0 and 1, got 0"),
    ],
)
def test_what_a_chosen_budget_needs(values, message):
    assert message in refusal(**{"budget": "auto", "calibration": CALIBRATION, **values})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_eviction": "lava"}, "kv_budget: 'auto' needs a calibration of policy 'lava' (given: snapkv)"),
        ({"kv_budget_max": 2}, "kv_budget_max: expected a fraction between 0 and 1, got 2"),
        ({"kv_budget_min": 0.99}, "kv_budget_min: expected at most kv_budget_max (0.95), got 0.99"),
    ],
)
def test_wrong_bounds_of_requests(options, message):
    assert message in request_refusal(auto(), **options)


def test_budgets_of_requests_must_hold_the_protected_tokens():
    message = request_refusal(parse(), kv_budget=16)
    assert "kv_budget: expected at least 33 tokens" in message
    assert "got 16" in message


@pytest.mark.parametrize("policy", [None, "snapkv", "lava"])
@pytest.mark.parametrize("server_allocator", [None, "uniform", "pyramid"])
def test_a_request_may_take_another_allocator(policy, server_allocator):
    config = parse(allocator=server_allocator, policy_options={"window": 16})
    changed = config.for_request({"kv_eviction": policy, "kv_budget_allocator": "adakv"}, 16)
    assert changed.allocator_name == "adakv"
    assert changed.allocator_options == {}
    assert changed.policy == (policy or "snapkv")
    assert changed.policy_options == ({} if policy == "lava" else {"window": 16})


def test_a_request_that_names_the_server_s_allocator_keeps_its_options():
    config = parse(allocator="adakv", allocator_options={"alpha": 0.5})
    assert config.for_request({"kv_budget_allocator": "adakv"}, 16) == config
    assert config.for_request({"kv_budget_allocator": "uniform"}, 16) == parse(allocator="uniform")
    # with another policy, whose own allocator would be a third one
    changed = config.for_request({"kv_eviction": "lava", "kv_budget_allocator": "adakv"}, 16)
    assert changed == parse(policy="lava", allocator="adakv", allocator_options={"alpha": 0.5})


def test_a_request_may_take_the_server_s_unnamed_allocator_with_another_policy():
    changed = parse(allocator_options={}).for_request({"kv_eviction": "lava", "kv_budget_allocator": "uniform"}, 16)
    assert changed.allocator_name == "uniform"


@pytest.mark.parametrize("allocator", [True, 5, ["adakv"]])
def test_allocators_of_requests_must_be_text(allocator):
    message = request_refusal(parse(), kv_budget_allocator=allocator)
    assert message == f"kv_budget_allocator: expected the name of an allocator, got {allocator!r}"


def test_unknown_allocators_of_requests_name_the_request_s_field():
    message = request_refusal(parse(), kv_budget_allocator="adakw")
    assert message.startswith("kv_budget_allocator: unknown budget allocator 'adakw'. Did you mean 'adakv'?")


@pytest.mark.parametrize(("said", "meant"), [(True, True), (1, True), ("true", True), (0, False), ("false", False)])
def test_a_request_says_whether_to_evict_during_decode(said, meant):
    for server in (None, True, False):
        changed = parse(during_decode=server).for_request({"kv_evict_during_decode": said}, 16)
        assert changed.method().schedule.evicts_answer is meant


@pytest.mark.parametrize("said", ["yes", 2, -1, 0.5, [1]])
@pytest.mark.parametrize("option", ["kv_evict_during_decode", "kv_evict_during_prefill"])
def test_wrong_answers_of_requests_about_later_evictions(option, said):
    assert request_refusal(parse(), **{option: said}) == f"{option}: expected true or false, got {said!r}"


@pytest.mark.parametrize("said", [True, 1, "true"])
def test_a_request_says_whether_to_evict_between_chunks(said):
    assert not parse().method().schedule.between_chunks
    assert parse().for_request({"kv_evict_during_prefill": said}, 16).method().schedule.between_chunks
    asked = parse(during_prefill=True).for_request({"kv_evict_during_prefill": 0}, 16)
    assert not asked.method().schedule.between_chunks


@pytest.mark.parametrize("policy", [True, False, 5, 0, 0.5, ["snapkv"], {}])
def test_policies_of_requests_must_be_text(policy):
    message = request_refusal(parse(), kv_eviction=policy)
    assert message == f"kv_eviction: expected 'none' or the name of a policy, got {policy!r}"


@pytest.mark.parametrize("policy", ["snapvk", "None", ""])
def test_unknown_policies_of_requests_name_the_request_s_field(policy):
    message = request_refusal(parse(), kv_eviction=policy)
    assert message.startswith("kv_eviction: ")
    assert repr(policy) in message
    assert f"Available: {', '.join(POLICIES.names())}" in message


def test_policies_and_allocators_are_made_once(tmp_path):
    """And what they read is read once: ``fixed`` has a file, which a later request may not find any more."""
    file = tmp_path / "weights.json"
    file.write_text("[1, 2]")
    values = {"allocator": "fixed", "allocator_options": {"file": str(file)}, "policy_options": {"window": 16}}
    config = parse(**values)
    file.unlink()
    for budget in range(64, 464):  # more than any cache of configurations would hold
        chosen = config.for_request({"kv_budget": budget}, 16)
        assert chosen.method().policy is config.method().policy
        assert chosen.method().allocator is config.method().allocator
    assert config.for_request({"kv_eviction": "lava", "kv_budget_allocator": "fixed"}, 16).method().allocator.file
    assert parse(**values).method().allocator is config.method().allocator
    with pytest.raises(ValueError, match=r"fixed\.file: expected a JSON file of weights"):
        parse(allocator="fixed", allocator_options={"file": str(tmp_path / "another.json")})


def test_options_that_json_does_not_know_are_refused():
    assert refusal(policy_options={"window": {1}}).startswith("policy_options: expected plain JSON, ")


def test_what_another_package_raises_about_its_options_is_a_refusal(monkeypatch):
    @dataclass(frozen=True)
    class Moody(SnapKV):
        def __post_init__(self):
            raise RuntimeError("not today")

    monkeypatch.setitem(POLICIES._classes, "test-moody", Moody)
    message = request_refusal(parse(), kv_eviction="test-moody")
    assert message == "policy_options: eviction policy 'test-moody': not today"


NUMBERS = [
    float("nan"),
    float("inf"),
    -float("inf"),
    0,
    -1,
    -0.5,
    1.0,
    0.9999999,
    5e-324,
    True,
    2**63,
    10**30,
    10**4299,
]
WRONG = [*NUMBERS, 10**5000, -(10**5000), "", "96", "auto", "TRUE", b"96", [96], {"a": 1}, {}, [[[]]], {1}, object()]
NAMES = [
    "kvpress:os:system",
    "kvpress:KnormPress",
    "kvpress:",
    "kvpress::",
    ":",
    "snapkv\nfoo",
    "NONE",
    "none",
    "fixed",
]
HUGE = ["a" * 10**6, "abcdefghij" * 10**5, "kvpress:" + "a" * 10**6, ["a" * 10**6] * 1000]
VALUES = st.one_of(
    st.sampled_from(WRONG),
    st.sampled_from([*NAMES, *HUGE]),
    st.sampled_from([*POLICIES.names(), *ALLOCATORS.names()]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
)
OPTIONS = options_of_requests(EvictionConfig)
KEYS = st.sampled_from([*OPTIONS, "kv_transfer_params", "kv_budgt", "other", 5, None, "kv_" + "b" * 10**6])
LIMITS = [
    "all",
    "none",
    {"options": ["kv_budget", "kv_eviction"], "policies": ["lava", "none"]},
    {"least_budget": 64, "most_budget": 512},
    {"most_budget": 0.5, "policies": ["all"]},
]


def check_answer(server, options):
    """A config, or one short sentence, and soon."""
    began = time.process_time()
    try:
        config = server.for_request(options, 32)
        assert config is None or isinstance(config, EvictionConfig)
    except ValueError as error:
        assert not isinstance(error, ValidationError)
        assert len(str(error)) < 1000 and "\n" not in str(error)
    assert time.process_time() - began < 0.1  # seconds: a thousand times what it takes


@pytest.mark.parametrize("option", [*OPTIONS, "kv_unknown"])
def test_whatever_an_option_is_it_is_taken_or_refused_in_one_short_sentence(option):
    for value in (*WRONG, *NAMES, *HUGE):
        check_answer(parse(budget=96), {option: value})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    options=st.dictionaries(KEYS, VALUES, max_size=5) | st.dictionaries(st.text() | st.integers(), VALUES, max_size=3),
    limits=st.sampled_from(LIMITS),
    budget=st.sampled_from([96, 0.5, "auto"]),
)
def test_whatever_a_request_says_is_taken_or_refused_in_one_short_sentence(options, limits, budget):
    check_answer(parse(budget=budget, calibration=CALIBRATION, request_options=limits), options)
