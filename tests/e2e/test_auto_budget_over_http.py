"""``calibrate`` as a user runs it, and a server that goes by such a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.conftest import ROOT
from tests.e2e.prompts import long_text
from tools.server import Server
from vllm_kvevict.commands.main import main

ENGINE = ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20))


@pytest.mark.more("budgets/test_curve.py tests what it fits; servers of the first tier read such a file")
@pytest.mark.feature("a budget chosen for each prompt")
def test_calibrate_writes_a_file_for_servers_of_its_model(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "calibration.json"
    flags = ["--kv-eviction", "knorm", "--prompt-tokens", "256", "--prompts", "1", "--kept", "0.3", "0.6", *ENGINE]
    main(["calibrate", "--model", str(smollm2), "--out", str(file), *flags])
    assert f"wrote {file}: alpha" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["model"] == str(smollm2)
    assert found["policies"].keys() == {"knorm"}
    assert found["policies"]["knorm"].keys() == {"alpha", "beta"}

    load_general_plugins()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    serve = ["--model", str(smollm2), "--kv-eviction", "knorm", "--kv-budget", "auto"]
    args = EngineArgs.from_cli_args(parser.parse_args([*serve, "--kv-budget-calibration", str(file)]))
    assert args.additional_config["kv_eviction"]["calibration"] == found["policies"]

    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "--model", str(ROOT), "--out", str(file), *flags])
    assert ended.value.code == 2
    assert "--out: expected a calibration of" in capsys.readouterr().err


@pytest.mark.feature("a budget chosen for each prompt")
def test_requests_choose_and_bound_it(server: Server, client: OpenAI) -> None:
    def ask(**options: Any) -> tuple[int, float]:
        """Return the prompt's tokens, and how many of them were evicted."""
        before = server.metrics()["kvevict:evicted_tokens_total"]
        messages: Any = [{"role": "user", "content": long_text(40)}]
        answer = client.chat.completions.create(
            model="model", messages=messages, max_tokens=8, extra_body={"vllm_xargs": {"kv_budget": "auto", **options}}
        )
        assert answer.usage is not None
        return answer.usage.prompt_tokens, server.metrics()["kvevict:evicted_tokens_total"] - before

    num_tokens, chosen = ask()
    assert 0 <= chosen <= 0.95 * num_tokens
    bounded = [ask(kv_budget_min=0.8)[1], ask(kv_budget_max=0.2)[1], ask(kv_budget=0.5)[1]]
    assert bounded[0] <= 0.2 * num_tokens
    assert bounded[1] >= 0.8 * num_tokens - 32
    assert 0.5 * num_tokens - 32 <= bounded[2] <= 0.5 * num_tokens + 32  # the last block is filled in part
    with pytest.raises(BadRequestError, match="'auto' needs a calibration of policy 'knorm'"):
        ask(kv_eviction="knorm")
    with pytest.raises(BadRequestError, match="kv_budget_max: expected a fraction between 0 and 1, got 3"):
        ask(kv_budget_max=3)
    assert server.is_healthy()
