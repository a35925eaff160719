"""Every ``vllm serve`` that the pages quote is read by vLLM's own parser, and their offline example runs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.conftest import ROOT
from tests.e2e.prompts import long_text
from tests.pages import DOCS, EXAMPLE, PAGES, blocks_of, commands_of
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.policies import POLICIES

pytestmark = pytest.mark.more_on_v2("flags and arguments know no runner")


def servers() -> Iterator[list[str]]:
    """The flags behind ``vllm serve MODEL``, once each."""
    seen = []
    for page in PAGES:
        for _, _, *words in commands_of(page.read_text(), "vllm serve"):
            if words[:1] == ["MODEL"] and "..." not in words and words not in seen:
                seen.append(words)
                yield words[1:]


@pytest.fixture
def quoted_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that those commands name, and the policy of the example."""
    (limits,) = [block for page in DOCS for block in blocks_of(page, "yaml") if block.startswith("# limits.yaml")]
    (tmp_path / "limits.yaml").write_text(limits)
    calibration = {"model": "MODEL", "policies": {"compactor": {"alpha": 1.0, "beta": -8.0}}}
    (tmp_path / "calibration.json").write_text(json.dumps(calibration))
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("fading_norm", EXAMPLE / "fading_norm.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setitem(POLICIES._classes, "fading_norm", example.FadingNorm)


@pytest.mark.usefixtures("quoted_files")
@pytest.mark.parametrize("flags", list(servers()), ids=" ".join)
def test_a_server_of_the_pages_is_configured(flags: list[str], tiny_llama: Path) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(tiny_llama), *flags]))
    config = EvictionConfig.parse(args.additional_config["kv_eviction"])
    assert config.policy == flags[flags.index("--kv-eviction") + 1]
    assert str(config.budget) == flags[flags.index("--kv-budget") + 1]


def test_the_offline_example_of_the_page(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"max_model_len": 512, "kv_cache_memory_bytes": 64 << 20, "dtype": "float32", "enforce_eager": True}
    monkeypatch.setattr(vllm, "LLM", partial(vllm.LLM, **small))
    (code,) = [block for block in blocks_of(ROOT / "docs/configuration.md", "python") if "LLM(" in block]
    names: dict[str, Any] = {"model": str(smollm2)}
    exec(code, names)
    llm = names["llm"]
    try:
        # a request's options as the page has them below
        params = vllm.SamplingParams(max_tokens=4, ignore_eos=True, extra_args={"kv_budget": 128})
        (output,) = llm.generate([long_text(2)], params, use_tqdm=False)
        assert llm.llm_engine.vllm_config.additional_config["kv_eviction"] == {"policy": "snapkv", "budget": 2048}
        assert len(output.outputs[0].token_ids) == 4
    finally:
        llm.llm_engine.engine_core.shutdown()
