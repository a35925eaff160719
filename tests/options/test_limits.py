"""What an operator lets requests choose, and that a refusal names the option, what is allowed and who decides."""

import json
import re

import pytest

from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.options.limits import RequestOptions
from vllm_kvevict.options.names import is_ours
from vllm_kvevict.options.table import check_names, options_of_requests
from vllm_kvevict.policies import POLICIES

OPTIONS = options_of_requests(EvictionConfig)

BLOCK = 16


def server(limits, **values):
    return EvictionConfig.parse({"policy": "snapkv", "budget": 1024, "request_options": limits, **values})


def refusal(config, **options):
    with pytest.raises(ValueError) as error:
        config.for_request(options, BLOCK)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    return message


ANY = {"kv_eviction": "lava", "kv_budget": 0.25, "kv_budget_allocator": "adakv", "kv_evict_during_decode": 1}


@pytest.mark.parametrize("limits", ["all", {}, {"policies": ["all"]}, {"options": list(ANY), "policies": ["lava"]}])
def test_what_is_allowed_is_as_it_was(limits):
    chosen = server(limits).for_request(ANY, BLOCK)
    assert (chosen.policy, chosen.budget, chosen.allocator, chosen.during_decode) == ("lava", 0.25, "adakv", True)
    assert server(limits).for_request({}, BLOCK) == server(limits)


def test_by_default_everything_is_allowed():
    config = EvictionConfig.parse({"policy": "snapkv", "budget": 1024})
    assert config.request_options == "all"
    assert config.for_request(ANY, BLOCK).policy == "lava"


@pytest.mark.parametrize("option", OPTIONS)
def test_none_may_be_chosen(option):
    message = refusal(server("none"), **{option: 1})
    assert message == (
        f"{option}: the operator of this server (--kv-request-options) lets requests choose no option; leave it out"
    )
    assert server("none").for_request({option: None, "other": 1}, BLOCK) == server("none")


def test_options_that_are_not_listed_may_not_be_chosen():
    config = server({"options": ["kv_budget", "kv_eviction"]})
    assert config.for_request({"kv_budget": 512, "kv_eviction": "lava"}, BLOCK).budget == 512
    message = refusal(config, kv_evict_interval=1)
    assert message.startswith("kv_evict_interval: the operator of this server (--kv-request-options) lets requests ")
    assert message.endswith("choose kv_budget, kv_eviction; leave it out")


def test_policies_that_are_not_listed_may_not_be_named():
    config = server({"policies": ["lava"]})
    for allowed in ("snapkv", "lava"):  # the server's own, too
        assert config.for_request({"kv_eviction": allowed}, BLOCK).policy == allowed
    for policy in ("morphkv", "none", "all", "snapvk"):
        message = refusal(config, kv_eviction=policy)
        assert message.startswith("kv_eviction: the operator of this server (--kv-request-options) lets requests ")
        assert message.endswith(f"choose snapkv, lava; got {policy!r}; name one of them")
    assert server({"policies": ["none"]}).for_request({"kv_eviction": "none"}, BLOCK) is None
    assert "lets requests choose snapkv, all; got 'none'" in refusal(server({"policies": ["all"]}), kv_eviction="none")
    assert "unknown eviction policy 'all'" in refusal(server("all"), kv_eviction="all")


@pytest.mark.parametrize(
    ("limits", "allowed", "refused", "words"),
    [
        ({"most_budget": 512}, [512, 33], [513, 0.01], "budgets, in tokens, of at most 512"),
        ({"least_budget": 64}, [64, 10**6], [63, 0.9], "budgets, in tokens, of at least 64"),
        ({"least_budget": 0.1, "most_budget": 0.5}, [0.1, 0.5], [0.09, 0.51, 33], "fractions of at least 0.1 and at "),
    ],
)
def test_budgets_have_bounds(limits, allowed, refused, words):
    config = server(limits)
    for budget in [*allowed, 1024]:  # the server's own, too
        assert config.for_request({"kv_budget": budget}, BLOCK).budget == budget
    for budget in refused:
        message = refusal(config, kv_budget=budget)
        assert message.startswith(f"kv_budget: the operator of this server (--kv-request-options) allows {words}")
        assert message.endswith(f", got {budget}; choose one of those")
    assert "kv_budget: expected a whole number" in refusal(config, kv_budget="many")


def test_with_a_most_budget_no_request_keeps_everything_unless_the_operator_says_so():
    message = refusal(server({"most_budget": 512}), kv_eviction="none")
    assert message.startswith("kv_eviction: 'none' keeps a whole prompt, and the operator of this server")
    assert message.endswith("allows budgets, in tokens, of at most 512; leave it out")
    assert server({"most_budget": 512, "policies": ["none"]}).for_request({"kv_eviction": "none"}, BLOCK) is None


def test_chosen_budgets_have_bounds():
    calibration = {"snapkv": {"alpha": 1.0, "beta": -9.0}}
    config = server({"least_budget": 0.1, "most_budget": 0.5}, calibration=calibration)
    options = {"kv_budget": "auto", "kv_budget_min": 0.1, "kv_budget_max": 0.5}
    assert config.for_request(options, BLOCK).auto_budget().most == 0.5
    assert refusal(config, kv_budget="auto", kv_budget_min=0.1).startswith("kv_budget_max: the operator of this server")
    assert refusal(config, kv_budget="auto", kv_budget_max=0.5).startswith("kv_budget_min: the operator of this server")
    own = server({"most_budget": 0.5}, budget="auto", calibration=calibration)  # up to 0.95
    assert own.for_request({"kv_budget": "auto", "kv_budget_min": 0.3}, BLOCK).budget_max == 0.95
    assert ", got 0.6; choose one of those" in refusal(own, kv_budget_max=0.6)
    in_tokens = server({"most_budget": 512}, calibration=calibration)
    assert refusal(in_tokens, kv_budget="auto").endswith(
        "allows budgets, in tokens, of at most 512, got 'auto'; choose one of those"
    )


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("some", "expected 'all', 'none', or a mapping of options, policies, least_budget and most_budget, got 'some'"),
        (
            ["kv_budget"],
            "expected 'all', 'none', or a mapping of options, policies, least_budget and most_budget, got [",
        ),
        (
            {"option": []},
            "unknown field 'option'. Did you mean 'options'? Available: options, policies, least_budget, most_budget",
        ),
        (
            {"options": ["kv_budgt"]},
            "options: unknown option 'kv_budgt'. Did you mean 'kv_budget'? Available: kv_evict",
        ),
        ({"options": "kv_budget"}, "options: expected a list of names, got 'kv_budget'"),
        ({"policies": ["snapvk"]}, "policies: unknown eviction policy 'snapvk'. Did you mean 'snapkv'?"),
        ({"policies": [5]}, "policies: expected a list of names, got 5"),
        ({"most_budget": 0}, "most_budget: expected tokens, at least 1, or a fraction, got 0"),
        ({"least_budget": "auto"}, "least_budget: expected tokens, at least 1, or a fraction, got 'auto'"),
        ({"least_budget": 9, "most_budget": 8}, "most_budget: expected at least least_budget (9), in its unit, got 8"),
        (
            {"least_budget": 0.1, "most_budget": 8},
            "most_budget: expected at least least_budget (0.1), in its unit, got 8",
        ),
    ],
)
def test_limits_that_make_no_sense_are_refused_at_the_start(limits, message):
    with pytest.raises(ValueError, match=re.escape(f"kv_request_options: {message}")) as error:
        server(limits)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("limits", "policies", "allocators"),
    [
        ("all", True, True),
        ({"most_budget": 64}, True, True),
        ({"options": ["kv_eviction"], "policies": ["lava", "all"]}, True, False),
        ({"policies": ["lava"]}, False, True),
        ("none", False, False),
    ],
)
def test_what_requests_may_choose_is_imported_at_the_start(monkeypatch, limits, policies, allocators):
    imported = []
    for registry in (POLICIES, ALLOCATORS):
        monkeypatch.setattr(registry, "import_all", lambda registry=registry: imported.append(registry))
    server(limits)
    assert imported == [POLICIES] * policies + [ALLOCATORS] * allocators


def test_limits_travel_as_json():
    limits = {"options": ["kv_budget"], "policies": ["lava", "none"], "least_budget": 64}
    config = server(limits)
    for exclude_unset in (True, False):
        dumped = json.loads(json.dumps(config.model_dump(exclude_unset=exclude_unset)))
        assert EvictionConfig.parse(dumped) == config
    assert config.request_options == RequestOptions.parse(limits, OPTIONS)
    assert config.for_request({"kv_budget": 64}, BLOCK).request_options == config.request_options


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("kv_budgt", "kv_budget"),
        ("kv_policy", "kv_eviction"),
        ("kv_evict", "kv_eviction"),
        ("KV_BUDGET", "kv_budget"),
        ("kv-evict-during-decode", "kv_evict_during_decode"),
        ("kv_allocator", "kv_budget_allocator"),
        ("kv_", None),
        ("kv_" + "x" * 10**7, None),
    ],
)
def test_unknown_options_get_a_suggestion(name, meant):
    message = refusal(server("all"), **{name: 1})
    hint = f" Did you mean {meant!r}?" if meant else ""
    assert message.startswith("vllm_xargs: unknown option 'kv" if name.islower() else "vllm_xargs: unknown option 'KV")
    assert message.endswith(f".{hint} Available: {', '.join(OPTIONS)}")


def test_names_of_others_are_left_alone():
    """What vLLM itself, its models and other plugins read of the same dictionary."""
    others = ["kv_transfer_params", "kv_cache_report_mode", "ec_transfer_params", "session_id", "ngram_size", "kv", 5]
    check_names(dict.fromkeys(others, 1), OPTIONS, OPTIONS)
    assert not any(is_ours(name) for name in others)
    assert server("none").for_request(dict.fromkeys(others, 1), BLOCK) == server("none")


def test_an_unknown_option_is_answered_with_those_that_the_operator_allows():
    message = refusal(server({"options": ["kv_budget"]}), kv_budgt=64)
    assert message.endswith("Did you mean 'kv_budget'? Available: kv_budget")
    message = refusal(server("none"), kv_budgt=64)
    assert message == "vllm_xargs: unknown option 'kv_budgt'. Available: none"
