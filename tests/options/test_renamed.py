"""Old names of a policy's options, in what a user writes and in what travels."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.options.renamed import with_new_names
from vllm_kvevict.policies import POLICIES

RENAMED = [
    ("curdkv", "n_sink", "num_sink"),
    ("expected_attention", "n_future_positions", "num_future_positions"),
    ("expected_attention", "n_sink", "num_sink"),
    ("streaming_llm", "n_sink", "num_sink"),
]


def parse(policy: str, /, **policy_options: Any) -> EvictionConfig:
    return EvictionConfig.parse({"policy": policy, "budget": 256, "policy_options": policy_options})


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(("policy", "old", "new"), RENAMED)
def test_an_old_name_is_taken_with_one_warning(policy: str, old: str, new: str) -> None:
    with pytest.warns(FutureWarning) as caught:
        assert with_new_names(policy, {old: 9, "seed": 1}) == {new: 9, "seed": 1}
    (warning,) = caught
    assert str(warning.message) == f"{policy}.{old} is called {new!r} now; the old name is accepted until 0.2"


def test_these_are_all_old_names() -> None:
    old_names = [(name, old, new) for name in POLICIES.names() for old, new in POLICIES.get(name).old_names.items()]
    assert old_names == RENAMED


@pytest.mark.parametrize(("policy", "old", "new"), RENAMED)
def test_an_option_under_both_names_is_refused(policy: str, old: str, new: str) -> None:
    with pytest.raises(ValueError) as error:
        with_new_names(policy, {old: 9, new: 9})
    assert str(error.value) == f"{policy}.{new}: expected one name, got {old!r} and {new!r}; leave {old!r} out"


def test_todays_names_and_those_of_others_warn_of_nothing() -> None:
    with no_warning():
        assert with_new_names("streaming_llm", {"num_sink": 9}) == {"num_sink": 9}
        assert with_new_names("vatp", {"n_sink": 9}) == {"n_sink": 9}  # was never called so


def test_a_configuration_with_an_old_name_is_the_one_with_the_new_name() -> None:
    with pytest.warns(FutureWarning, match=r"expected_attention\.n_sink is called 'num_sink' now") as caught:
        config = parse("expected_attention", n_sink=9)
    assert len(caught) == 1
    assert config == parse("expected_attention", num_sink=9)
    assert config.method().num_sink == 9


def test_only_the_process_that_reads_it_warns() -> None:
    with pytest.warns(FutureWarning):
        config = parse("streaming_llm", n_sink=9)
    with no_warning():
        travelled = EvictionConfig.parse(json.loads(json.dumps(config.model_dump(exclude_unset=True))))
        chosen = travelled.for_request({"kv_budget": 96}, 16)
    assert chosen is not None and chosen.method().num_sink == 9


def test_both_names_are_refused() -> None:
    expected = (
        "kv_eviction.policy_options: streaming_llm.num_sink: expected one name, got 'n_sink' and 'num_sink'; leave "
        "'n_sink' out"
    )
    with pytest.raises(ValueError) as error:
        parse("streaming_llm", n_sink=9, num_sink=9)
    assert str(error.value) == expected


@pytest.mark.parametrize("wrapper", ["chunkkv", "criticalkv"])
def test_a_policy_inside_another_may_have_old_names_as_well(wrapper: str) -> None:
    with pytest.warns(FutureWarning, match=r"curdkv\.n_sink") as caught:
        config = parse(wrapper, policy="curdkv", policy_options={"n_sink": 11})
    assert len(caught) == 1
    assert config.policy_options == {"policy": "curdkv", "policy_options": {"num_sink": 11}}
    assert config.method().num_sink == 11
    with pytest.raises(ValueError, match=r"curdkv\.num_sink: expected one name"):
        parse(wrapper, policy="curdkv", policy_options={"n_sink": 11, "num_sink": 11})


@pytest.mark.parametrize("options", [{"policy": "no"}, {"policy": ["curdkv"]}, {"policy_options": [1]}, {"policy": 7}])
def test_what_is_wrong_with_the_policy_inside_is_told_as_without_old_names(options: dict[str, Any]) -> None:
    options = {"policy_options": {"n_sink": 9}, **options}
    with no_warning():
        assert with_new_names("chunkkv", options) == options


def test_a_name_that_never_was_one_is_unknown() -> None:
    with no_warning(), pytest.raises(ValueError, match=r"policy_options: .*'vatp' takes .*; got 'n_sink'"):
        parse("vatp", n_sink=9)


def test_a_policy_that_is_refused_itself_is_what_the_message_is_about() -> None:
    with pytest.raises(ValidationError) as error:
        EvictionConfig.model_validate({"policy": "streaming", "budget": 256, "policy_options": {"n_sink": 9}})
    assert [found["loc"] for found in error.value.errors()] == [("policy",)]
