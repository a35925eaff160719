"""The offline example of the pages runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import vllm

from tests.conftest import ROOT
from tests.e2e.prompts import long_text
from tests.pages import blocks_of

pytestmark = pytest.mark.more_on_v2("flags and arguments know no runner")


def test_the_offline_example_of_the_page(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"max_model_len": 512, "kv_cache_memory_bytes": 64 << 20, "dtype": "float32", "enforce_eager": True}
    monkeypatch.setattr(vllm, "LLM", partial(vllm.LLM, **small))
    (code,) = [block for block in blocks_of(ROOT / "docs/configuration.md", "python") if "LLM(" in block]
    names: dict[str, Any] = {"model": str(smollm2), "__name__": "__main__"}
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
