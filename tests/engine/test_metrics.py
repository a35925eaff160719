"""The gauges of a server with several API processes, which share one /metrics."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_kvevict.engine.frontend.metrics import process_metrics, with_eviction_metrics
from vllm_kvevict.engine.messages import Gauges, pack

PROCESS = """
from prometheus_client import CollectorRegistry
from vllm_kvevict.engine.frontend.metrics import EvictionMetrics
from vllm_kvevict.engine.messages import Gauges
metrics = EvictionMetrics(CollectorRegistry())
metrics.announce("snapkv", "uniform")
"""


def test_an_api_server_that_starts_late_hides_no_gauge(tmp_path: Path) -> None:
    """It announces zeros; the most recent value that a process has set is what counts."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for statement in ("metrics.show(Gauges(kept_tokens=96, kept_pages=12), engine=0)", ""):
        subprocess.run([sys.executable, "-c", PROCESS + statement], env=environment, check=True, timeout=120)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    values = {
        (sample.name, sample.labels["engine"]): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if "engine" in sample.labels
    }
    assert values == {
        ("kvevict:kept_tokens", "0"): 96.0,
        ("kvevict:kept_pages", "0"): 12.0,
    }


def test_answers_that_the_cache_cuts_short_are_counted() -> None:
    def value() -> float:
        (metric,) = process_metrics().cut_short.collect()
        return next(sample.value for sample in metric.samples if sample.name.endswith("_total"))

    before, stats = value(), SimpleNamespace(kv_connector_stats=pack([], Gauges(), num_cut_short=2))
    with_eviction_metrics(lambda *args: None)(None, stats, None)
    assert value() == before + 2 and stats.kv_connector_stats is None
