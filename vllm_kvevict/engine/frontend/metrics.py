"""Counters on /metrics. Scheduler and worker count; the front end exports."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.messages import PAYLOAD, EvictionRecord, Gauges
from vllm_kvevict.options.table import options_of_requests

UNKNOWN_OPTION = "unknown"  # a client must not choose labels
_LABELS = ("policy", "allocator")
_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass
class EvictionMetrics:
    """Our collectors in one Prometheus registry."""

    registry: CollectorRegistry = field(default_factory=lambda: REGISTRY)

    def __post_init__(self) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"kvevict:{name}", text, _LABELS, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"kvevict:{name}", text, _LABELS, buckets=buckets, registry=self.registry)

        self.evictions = counter("evictions_total", "Prompts evicted.")
        self.decode_evictions = counter("decode_evictions_total", "Blocks of answers evicted.")
        self.evicted_tokens = counter("evicted_tokens_total", "Tokens dropped per KV head and layer.")
        self.freed_blocks = counter("freed_blocks_total", "KV blocks given back to vLLM's pool.")
        self.kept_fraction = histogram("kept_fraction", "Tokens kept / tokens of the prompt.", _FRACTIONS)
        self.seconds = histogram("eviction_seconds", "Time of score, allocate, select and compact.", _SECONDS)
        self.kept_tokens = self._gauge(
            "kept_tokens", "Prompt tokens that evicted requests hold, per KV head and layer."
        )
        self.kept_pages = self._gauge("kept_pages", "Pages of prompts that evicted requests hold, in one worker.")
        self.cut_short = Counter(
            "kvevict:answers_cut_short_total",
            "Answers that ended with finish reason length since the KV cache could hold no more of them.",
            registry=self.registry,
        )
        self.refusals = Counter(
            "kvevict:refused_requests_total",
            "Requests refused for a wrong option, by the option.",
            ("option",),
            registry=self.registry,
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"kvevict:{name}", text, ("engine",), registry=self.registry, multiprocess_mode="mostrecent")

    def announce(self, policy: str, allocator: str) -> None:
        """Show these labels at 0 before the first eviction, as dashboards expect."""
        counters = (self.evictions, self.decode_evictions, self.evicted_tokens, self.freed_blocks)
        for collector in (*counters, self.kept_fraction, self.seconds):
            collector.labels(policy, allocator)
        for option in (*options_of_requests(EvictionConfig), UNKNOWN_OPTION):
            self.refusals.labels(option)
        for gauge in (self.kept_tokens, self.kept_pages):
            # never set: an API server that starts late would be the most recent, and hide what the others have set
            gauge.labels(0)

    def show(self, gauges: Gauges, engine: int = 0) -> None:
        """Set the gauges of one engine; data parallelism has several."""
        self.kept_tokens.labels(engine).set(gauges.kept_tokens)
        self.kept_pages.labels(engine).set(gauges.kept_pages)

    def observe(self, record: EvictionRecord) -> None:
        """Count one record."""
        labels = (record.policy, record.allocator)
        self.freed_blocks.labels(*labels).inc(record.freed_blocks)
        self.evicted_tokens.labels(*labels).inc(record.evicted_tokens)
        self.decode_evictions.labels(*labels).inc(record.during_decode)
        if record.seconds is not None:
            self.evictions.labels(*labels).inc()
            self.kept_fraction.labels(*labels).observe(record.kept_fraction)
            self.seconds.labels(*labels).observe(record.seconds)


@functools.cache
def process_metrics() -> EvictionMetrics:
    """Return the collectors of this process's /metrics."""
    return EvictionMetrics()


def with_eviction_metrics(record: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``StatLoggerManager.record``: take our payload out of the stats before vLLM's loggers see it.

    It travels in ``kv_connector_stats``, the one free-form field of SchedulerStats, which is ours alone since KV
    connectors are refused with eviction.
    """

    @functools.wraps(record)
    def wrapper(
        self: Any, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int | None = None
    ) -> Any:
        payload = getattr(scheduler_stats, "kv_connector_stats", None)
        if isinstance(payload, dict) and PAYLOAD in payload:
            scheduler_stats.kv_connector_stats = None
            for values in payload[PAYLOAD]:
                process_metrics().observe(EvictionRecord(**values))
            process_metrics().cut_short.inc(payload["cut_short"])
            process_metrics().show(Gauges(**payload["gauges"]), engine_idx or 0)
        return record(self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    return wrapper
