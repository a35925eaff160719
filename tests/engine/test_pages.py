"""Every ``vllm serve`` that README.md and docs/ quote is read by vLLM's own parser and makes a configuration."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.pages import DOCS, EXAMPLE, PAGES, blocks_of, commands_of
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.policies import POLICIES

pytestmark = pytest.mark.more_on_v2("a parser knows no runner")


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
