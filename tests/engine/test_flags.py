"""Flags, YAML and offline arguments reach ``additional_config``; wrong ones are refused before a model loads."""

from __future__ import annotations

import inspect
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from vllm.config import set_current_vllm_config
from vllm.config.cache import CacheDType
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tools import newest_vllm
from vllm_kvevict import kv_eviction_args
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.checks import check_config
from vllm_kvevict.engine.worker.backends.cpu import EvictionCPUImpl

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


def test_a_namespace_that_is_read_again_says_the_same(tiny_llama: Path) -> None:
    """vLLM hands the namespace on to more API server processes, which read it before they load plugins."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    namespace = parser.parse_args(["--model", str(tiny_llama), *FLAGS, "--kv-eviction-log-requests"])
    expected = {"kv_eviction": {"policy": "snapkv", "budget": 256, "log_requests": True}}
    for _ in range(2):
        assert EngineArgs.from_cli_args(namespace).additional_config == expected
    stock = inspect.unwrap(EngineArgs.from_cli_args.__func__)
    assert stock(EngineArgs, pickle.loads(pickle.dumps(namespace))).additional_config == expected


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


def test_a_calibration_comes_from_its_file(parse: Parse, tmp_path: Path) -> None:
    file, constants = tmp_path / "calibration.json", {"snapkv": {"alpha": 1.5, "beta": -8.0}}
    file.write_text(json.dumps({"model": "m", "policies": constants}))
    arguments = ["--kv-eviction", "snapkv", "--kv-budget", "auto", "--kv-budget-calibration"]
    values = parse([*arguments, str(file)]).additional_config["kv_eviction"]
    assert values == {"policy": "snapkv", "budget": "auto", "calibration": constants}
    file.write_text(json.dumps({"model": "m", "policies": {"lava": constants["snapkv"]}}))
    with pytest.raises(ValueError, match=r"'auto' needs a calibration of policy 'snapkv' \(given: lava\); make one"):
        parse([*arguments, str(file)])


LIMITS = {"options": ["kv_budget", "kv_eviction"], "policies": ["lava", "none"], "most_budget": 512}


def test_what_requests_may_choose_is_a_flag(parse: Parse, tmp_path: Path) -> None:
    file = tmp_path / "limits.yaml"
    file.write_text("options: [kv_budget, kv_eviction]\npolicies: [lava, none]\nmost_budget: 512\n")
    for said, meant in (("all", "all"), ("none", "none"), (json.dumps(LIMITS), LIMITS), (str(file), LIMITS)):
        values = parse([*FLAGS, "--kv-request-options", said]).additional_config["kv_eviction"]
        assert values == {"policy": "snapkv", "budget": 256, "request_options": meant}
        assert kv_eviction_args("snapkv", 256, request_options=meant) == {"additional_config": {"kv_eviction": values}}
    server = tmp_path / "server.yaml"
    server.write_text("kv-eviction: snapkv\nkv-budget: 256\nkv-request-options: {most_budget: 512}\n")
    values = parse(["--config", str(server)]).additional_config["kv_eviction"]
    assert values == {"policy": "snapkv", "budget": 256, "request_options": {"most_budget": 512}}


def test_vllms_own_config_file_takes_the_flags(parse: Parse, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("kv-eviction: snapkv\nkv-budget: 512\nkv-eviction-config: {num_sink: 4}\n")
    values = parse(["--config", str(file)]).additional_config["kv_eviction"]
    assert values == {"policy": "snapkv", "budget": 512, "num_sink": 4}


def test_help_has_a_group_with_the_policies() -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    (group,) = [group for group in parser._action_groups if group.title == "KVEviction"]
    flags = [option for action in group._group_actions for option in action.option_strings]
    names = ["kv-eviction", "kv-budget", "kv-budget-calibration", "kv-budget-allocator", "kv-protect-multimodal"]
    names += [
        "kv-evict-during-decode",
        "no-kv-evict-during-decode",
        "kv-evict-during-prefill",
        "kv-evict-interval",
        "kv-evict-max-num-seqs",
    ]
    names += ["kv-eviction-log-requests", "kv-request-options", "kv-eviction-config"]
    assert flags == [f"--{name}" for name in names]
    assert "snapkv" in group._group_actions[0].help
    assert "uniform" in group._group_actions[3].help


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--kv-eviction", "snapkvv", "--kv-budget", "256"],
            "unknown eviction policy 'snapkvv'. Did you mean 'snapkv'?",
        ),
        ([*FLAGS, "--kv-budget-allocator", "lavaa"], "unknown budget allocator 'lavaa'. Did you mean 'lava'?"),
        (["--kv-eviction", "snapkv", "--kv-budget", "many"], "expected a whole number of tokens, a fraction"),
        ([*FLAGS, "--kv-eviction-config", "missing.yaml"], "expected a YAML or JSON file"),
        ([*FLAGS, "--kv-eviction-config", "{broken"], "expected a YAML or JSON file"),
        ([*FLAGS, "--kv-request-options", "some"], "expected a YAML or JSON file"),
        ([*FLAGS, "--kv-budget-calibration", "missing.json"], "expected a YAML or JSON file"),
        ([*FLAGS, "--kv-budget-calibration", '{"policies": 3}'], "expected 'policies', a mapping of names"),
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
        (["--kv-eviction", "snapkv", "--kv-budget", "1.5"], "or 'auto', got 1.5"),
        (
            [*FLAGS, "--kv-eviction-config", '{"sink": 4}'],
            "unknown field 'sink'. Did you mean 'num_sink'? Available: policy, budget",
        ),
        ([*FLAGS, "--kv-eviction-config", '{"policy_options": {"windw": 4}}'], "takes window, pool"),
        (
            [*FLAGS, "--kv-eviction-config", '{"policy_options": {"window": 0}}'],
            "snapkv.window: expected a whole number of at least 1",
        ),
        ([*FLAGS, "--additional-config", '{"kv_eviction": {}}'], "exclude each other"),
        (
            [*FLAGS, "--kv-request-options", '{"options": ["kv_budgt"]}'],
            "kv_request_options: options: unknown option 'kv_budgt'. Did you mean 'kv_budget'?",
        ),
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
    assert config.scheduler_config.scheduler_cls == "vllm_kvevict.engine.scheduler.scheduler.EvictionScheduler"
    assert config.parallel_config.worker_cls == "vllm_kvevict.engine.worker.cpu_worker.EvictionCPUWorker"
    assert created(tiny_llama, block_size=64).cache_config.block_size == 64


CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
DRAFT = {"method": "eagle", "num_speculative_tokens": 2}
# whatever vLLM has beside the model's own dtype and fp8 with one scale for all K of a layer
REFUSED_CACHES = sorted({*get_args(CacheDType)} - {"auto", "fp8", "fp8_e4m3", "fp8_e5m2"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            {"speculative_config": DRAFT},
            "speculative decoding by eagle; use one of the methods ngram, draft_model or leave",
            marks=pytest.mark.refused("drafts by other means than a model or n-grams"),
        ),
        *(
            pytest.param(
                {"kv_cache_dtype": dtype, "dtype": "float32"},
                f"a KV cache of {dtype} for a model in float32; use --kv-cache-dtype auto or fp8, or leave",
                marks=pytest.mark.refused("KV caches of other dtypes than fp8 and the model's own"),
            )
            for dtype in REFUSED_CACHES
        ),
        pytest.param(
            {"speculative_config": {"num_speculative_tokens": 2, "kv_cache_dtype": "int8_per_token_head"}},
            "a draft model's KV cache of int8_per_token_head; use auto or fp8 for kv_cache_dtype in --speculative",
            marks=pytest.mark.refused("KV caches of other dtypes than fp8 and the model's own"),
        ),
        pytest.param(
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
            "layers whose KV cache has another dtype",
            marks=pytest.mark.refused("KV caches of several dtypes"),
        ),
        pytest.param(
            {"block_size": 48}, "a block size of 48 on CPU", marks=pytest.mark.refused("odd block sizes on CPU")
        ),
        pytest.param(
            {"scheduler_cls": "some.Scheduler"},
            "the scheduler 'some.Scheduler'",
            marks=pytest.mark.refused("other scheduler classes"),
        ),
        pytest.param(
            {"worker_cls": "vllm.v1.worker.gpu_worker.Worker"},
            "the worker vllm.v1.worker.gpu_worker.Worker on the cpu platform",
            marks=pytest.mark.refused("platforms other than CPU, CUDA and ROCm"),
        ),
        pytest.param({"kv_transfer_config": CONNECTOR}, "KV connectors", marks=pytest.mark.refused("KV connectors")),
        pytest.param(
            {"kv_sharing_fast_prefill": True},
            "fast prefill, which drops the queries of layers that share the keys and values of others; drop --kv-shar",
            marks=pytest.mark.refused("fast prefill of layers that share keys and values"),
        ),
        pytest.param({"runner": "pooling"}, "pooling models", marks=pytest.mark.refused("pooling models")),
    ],
)
def test_what_cannot_work_is_refused_by_name(tiny_llama: Path, settings: dict[str, Any], message: str) -> None:
    if "speculative_config" in settings:
        settings = {"speculative_config": {**settings["speculative_config"], "model": str(tiny_llama)}}
    with pytest.raises(ValueError, match=r"--kv-eviction does not work with|is incompatible with dtype=") as error:
        created(tiny_llama, **settings)
    # vLLM 0.33 refuses by itself a cache in another float than the model's
    is_theirs = f'kv_cache_dtype="{settings.get("kv_cache_dtype")}" is incompatible with dtype="float32"'
    assert message in str(error.value) or (newest_vllm.is_used() and is_theirs in str(error.value))


def test_images_are_refused_with_eviction_between_chunks(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk behind the first eviction sees what came before it, and an image all of itself."""
    vllm_config = created(tiny_llama, **kv_eviction_args("snapkv", 256, max_num_seqs=1))
    bounded = EvictionConfig.parse({"policy": "snapkv", "budget": 256, "during_prefill": True})
    check_config(bounded, vllm_config)
    monkeypatch.setattr(vllm_config.model_config, "is_mm_prefix_lm", True)
    with pytest.raises(ValueError, match="kv_evict_during_prefill: does not work with a model whose images see all"):
        check_config(bounded, vllm_config)
    check_config(EvictionConfig.parse({"policy": "snapkv", "budget": 256}), vllm_config)


def test_drafts_are_refused_with_eviction_during_decode(tiny_llama: Path) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    created(tiny_llama, speculative_config=drafts)
    with pytest.raises(ValueError, match="kv_evict_during_decode: does not work with speculative decoding") as error:
        created(tiny_llama, **kv_eviction_args("morphkv", 256), speculative_config=drafts)
    assert "drop --speculative-config" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "feature"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative decoding, whose draft model has no part in it",
        ),
        ({"enable_lora": True}, "LoRA adapters"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    ],
)
def test_what_pseudo_tokens_cannot_work_with(tiny_llama: Path, settings: dict[str, Any], feature: str) -> None:
    created(tiny_llama, **kv_eviction_args("snapkv", 256), **settings)
    with pytest.raises(ValueError, match="policy 'laq' generates pseudo tokens") as error:
        created(tiny_llama, **kv_eviction_args("laq", 256), **settings)
    assert f"which does not work with {feature}; choose another policy" in str(error.value)


def test_pseudo_tokens_need_layers_that_see_everything(tiny_gemma: Path) -> None:
    created(tiny_gemma, **kv_eviction_args("laq_deferred", 256))
    with pytest.raises(ValueError, match="does not work with layers that see a part of the context only"):
        created(tiny_gemma, **kv_eviction_args("laq++", 256))


@pytest.mark.parametrize("prefix", ["--", "--no-"])
def test_eviction_during_decode_is_a_flag(parse: Parse, prefix: str) -> None:
    engine_args = parse(["--kv-eviction", "morphkv", "--kv-budget", "512", f"{prefix}kv-evict-during-decode"])
    expected = {"policy": "morphkv", "budget": 512, "during_decode": prefix == "--"}
    assert engine_args.additional_config == {"kv_eviction": expected}


def test_the_interval_is_a_flag(parse: Parse) -> None:
    engine_args = parse(["--kv-eviction", "morphkv", "--kv-budget", "512", "--kv-evict-interval", "1"])
    assert engine_args.additional_config == {"kv_eviction": {"policy": "morphkv", "budget": 512, "interval": 1}}


def test_a_window_longer_than_what_is_remembered_of_answers_is_refused(tiny_llama: Path) -> None:
    config = created(tiny_llama, **kv_eviction_args("streaming_llm", 256, max_num_seqs=1))
    config.cache_config.block_size = 16  # as on CUDA
    # its requests may name policies that look at 32 queries
    for fields in ({"interval": 1}, {"during_decode": True}):
        request = EvictionConfig.parse({"policy": "morphkv", "budget": 256, **fields})
        check_config(request, config)
        check_config(request.model_copy(update={"policy_options": {"window": 32}}), config)
        with pytest.raises(ValueError) as error:
            check_config(request.model_copy(update={"policy_options": {"window": 33}}), config)
        assert str(error.value) == (
            "kv_eviction: 'morphkv' with its allocator looks at the last 33 queries of answers, and this server "
            "remembers 32; start it with that policy, or lower the window"
        )
    of_prompts = {"policy": "snapkv", "budget": 256, "policy_options": {"window": 33}}
    check_config(EvictionConfig.parse(of_prompts), config)


SMALL = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 8, "max_position_embeddings": 2048}


@pytest.mark.more_on_v2("on V1 the same models are refused, before there is a runner")
@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        pytest.param(
            "DeepseekV2ForCausalLM",
            {"model_type": "deepseek_v2", "kv_lora_rank": 512, "q_lora_rank": None, "n_routed_experts": 4},
            "multi-head latent attention (MLA)",
            marks=pytest.mark.refused("multi-head latent attention (MLA)"),
        ),
        pytest.param(
            "WhisperForConditionalGeneration",
            {"model_type": "whisper", "d_model": 64, "encoder_layers": 1, "decoder_layers": 1},
            "encoder-decoder models",
            marks=pytest.mark.refused("encoder-decoder models"),
        ),
        pytest.param(
            "MambaForCausalLM",
            {"model_type": "mamba"},
            "models without attention",
            marks=pytest.mark.refused("models without attention"),
        ),
        pytest.param(
            "JambaForCausalLM",
            {"model_type": "jamba"},
            "hybrid models with recurrent layers",
            marks=pytest.mark.refused("models with recurrent layers"),
        ),
        pytest.param(
            "LlamaForCausalLM",
            {"model_type": "llama", "head_dim": 48},
            "a head size of 48 on CPU",
            marks=pytest.mark.refused("odd head sizes on CPU"),
        ),
    ],
)
def test_models_that_cannot_work_are_refused_by_name(
    tmp_path: Path, architecture: str, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "architectures": [architecture], **config}))
    with pytest.raises(ValueError, match="--kv-eviction does not work with") as error:
        created(tmp_path, max_model_len=400)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("attribute", "name"),
    [
        pytest.param({"alibi_slopes": [1.0, 0.5]}, "ALiBi", marks=pytest.mark.refused("ALiBi")),
    ],
)
def test_layers_that_cannot_work_are_refused_by_name(tiny_llama: Path, attribute: dict[str, Any], name: str) -> None:
    settings = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto", **attribute}
    message = f"--kv-eviction does not work with {name}.*; use another model or leave --kv-eviction out"
    with set_current_vllm_config(created(tiny_llama)), pytest.raises(ValueError, match=message):
        EvictionCPUImpl(2, 32, 1.0, 2, **settings)


def test_a_budget_that_cannot_hold_the_window_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"kv_budget: expected at least 33 tokens, got 32: blocks hold 32, and"):
        created(tiny_llama, **kv_eviction_args("snapkv", 32))
