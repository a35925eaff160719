"""Flags, YAML and offline arguments reach ``additional_config``; wrong ones are refused before a model loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kvevict import kv_eviction_args

# AsyncEngineArgs does this by itself before it makes its parser
load_general_plugins()

FLAGS = ["--kv-eviction", "snapkv", "--kv-budget", "256"]


Parse = Callable[..., EngineArgs]


@pytest.fixture
def parse(tiny_llama: Path) -> Parse:
    def from_arguments(arguments: list[str], cls: type[EngineArgs] = EngineArgs) -> EngineArgs:
        parser = cls.add_cli_args(FlexibleArgumentParser())
        return cls.from_cli_args(parser.parse_args(["--model", str(tiny_llama), *arguments]))

    return from_arguments


@pytest.mark.parametrize("cls", [EngineArgs, AsyncEngineArgs])
def test_flags_become_additional_config(parse: Parse, cls: type[EngineArgs]) -> None:
    engine_args = parse([*FLAGS, "--kv-budget-allocator", "uniform", "--additional-config", '{"other": 1}'], cls)
    assert type(engine_args) is cls
    assert engine_args.additional_config == {
        "other": 1,
        "kv_eviction": {"policy": "snapkv", "budget": 256, "allocator": "uniform"},
    }
    assert json.loads(json.dumps(engine_args.additional_config)) == engine_args.additional_config


def test_without_flags_nothing_is_added(parse: Parse) -> None:
    assert not parse([]).additional_config


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_flags_win_over_the_file(parse: Parse, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"eviction.{suffix}"
    file.write_text(json.dumps({"policy": "snapkv", "budget": 64, "num_sink": 4, "policy_options": {"window": 16}}))
    values = parse(["--kv-eviction-config", str(file), "--kv-budget", "0.25"]).additional_config["kv_eviction"]
    assert values == {"policy": "snapkv", "budget": 0.25, "num_sink": 4, "policy_options": {"window": 16}}


def test_config_may_be_json_text(parse: Parse) -> None:
    values = parse([*FLAGS, "--kv-eviction-config", '{"num_sink": 4}']).additional_config["kv_eviction"]
    assert values == {"policy": "snapkv", "budget": 256, "num_sink": 4}


def test_vllms_own_config_file_takes_the_flags(parse: Parse, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("kv-eviction: snapkv\nkv-budget: 512\nkv-eviction-config: {num_sink: 4}\n")
    values = parse(["--config", str(file)]).additional_config["kv_eviction"]
    assert values == {"policy": "snapkv", "budget": 512, "num_sink": 4}


def test_help_has_a_group_with_the_policies() -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    (group,) = [group for group in parser._action_groups if group.title == "KV eviction (vllm_kvevict)"]
    flags = [option for action in group._group_actions for option in action.option_strings]
    assert flags == ["--kv-eviction", "--kv-budget", "--kv-budget-allocator", "--kv-eviction-config"]
    assert "snapkv" in group._group_actions[0].help
    assert "uniform" in group._group_actions[2].help


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-eviction", "snapkvv", "--kv-budget", "256"], "invalid choice: 'snapkvv' (choose from"),
        ([*FLAGS, "--kv-budget-allocator", "lavaa"], "invalid choice: 'lavaa'"),
        (["--kv-eviction", "snapkv", "--kv-budget", "many"], "expected a whole number of tokens, or a fraction"),
        ([*FLAGS, "--kv-eviction-config", "missing.yaml"], "expected a YAML or JSON file"),
        ([*FLAGS, "--kv-eviction-config", "{broken"], "expected a YAML or JSON file"),
    ],
)
def test_the_parser_refuses(
    parse: Parse, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-eviction", "snapkv"], "'budget' is missing"),
        (["--kv-budget", "256"], "'policy' is missing"),
        (["--kv-eviction", "snapkv", "--kv-budget", "0"], "kv_budget: expected a whole number of tokens of at least 1"),
        (["--kv-eviction", "snapkv", "--kv-budget", "1.5"], "or a fraction between 0 and 1, got 1.5"),
        ([*FLAGS, "--kv-eviction-config", '{"sink": 4}'], "unknown field 'sink'. Available: policy, budget"),
        ([*FLAGS, "--kv-eviction-config", '{"policy_options": {"windw": 4}}'], "takes window, pool"),
        ([*FLAGS, "--kv-eviction-config", '{"policy_options": {"window": 0}}'], "snapkv.window: expected at least 1"),
        ([*FLAGS, "--additional-config", '{"kv_eviction": {}}'], "exclude each other"),
    ],
)
def test_the_config_refuses(parse: Parse, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse(arguments)
    assert "\n" not in str(error.value)


def created(model: Path, **kwargs: Any) -> Any:
    settings = {"skip_tokenizer_init": True, "enforce_eager": True, **kv_eviction_args("snapkv", 256), **kwargs}
    return EngineArgs(model=str(model), **settings).create_engine_config()


def test_offline_arguments_name_our_classes(tiny_llama: Path) -> None:
    config = created(tiny_llama)
    assert config.cache_config.block_size == 32
    assert config.scheduler_config.scheduler_cls == "vllm_kvevict.engine.scheduler.EvictionScheduler"
    assert config.parallel_config.worker_cls == "vllm_kvevict.engine.worker.EvictionCPUWorker"
    assert created(tiny_llama, block_size=64).cache_config.block_size == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        (
            {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 2}},
            "speculative decoding by draft",
        ),
        ({"kv_cache_dtype": "fp8"}, "a quantised KV cache (fp8)"),
        ({"block_size": 48}, "a block size of 48 on CPU"),
        ({"scheduler_cls": "some.Scheduler"}, "the scheduler 'some.Scheduler'"),
        ({"worker_cls": "vllm.v1.worker.gpu_worker.Worker"}, "platform"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "KV connectors",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(tiny_llama: Path, settings: dict[str, Any], message: str) -> None:
    if "speculative_config" in settings:
        settings = {"speculative_config": {**settings["speculative_config"], "model": str(tiny_llama)}}
    with pytest.raises(ValueError, match="--kv-eviction does not work with") as error:
        created(tiny_llama, **settings)
    assert message in str(error.value)


def test_a_budget_that_cannot_hold_the_window_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="kv_budget: expected at least 33 tokens, since blocks hold 32 and"):
        created(tiny_llama, **kv_eviction_args("snapkv", 32))
