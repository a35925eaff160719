"""A minute of the soak, with shorter prompts: no error but the invalid requests' own, and nothing held at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serving.soak import run


@pytest.mark.for_release(
    "a minute of load: engine/test_stress.py checks every page of such a mix, e2e/test_http.py a server's end"
)
def test_a_minute_of_random_load(smollm2: Path, tmp_path: Path) -> None:
    log, lengths = tmp_path / "server.log", (100, 1_000)
    soak, metrics = run(
        smollm2, seconds=60, clients=8, seed=1, log=log, lengths=lengths, num_answers=20, dtype="float32"
    )
    assert not soak.errors, soak.outcomes
    assert soak.outcomes["answered"] >= 15
    assert metrics["kvevict:evictions_total"] >= 10
    assert metrics["vllm:kv_cache_usage_perc"] == metrics["kvevict:kept_pages"] == 0
