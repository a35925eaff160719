"""What the dashboard and the alerts read: their PromQL, parsed. And Prometheus itself, where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from tools import prometheus

ROOT = Path(__file__).resolve().parents[1]
PROMETHEUS = prometheus.CONFIGURATION
OF_PROMETHEUS = {"up", "ALERTS"}  # series that it makes itself


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(prometheus.DASHBOARD.read_text())
    return found


def alerts() -> dict[str, dict[str, Any]]:
    """The alert rules, by their names."""
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def panel_queries() -> list[str]:
    """The PromQL of all panels, with a duration in place of Grafana's variable."""
    return [target["expr"] for panel in prometheus.panels("1m") for target in panel["targets"]]


def queries() -> list[str]:
    """The PromQL of all panels and alerts."""
    return panel_queries() + [rule["expr"] for rule in alerts().values()]


def selectors(query: str) -> list[promql.VectorSelector]:
    """The time series that a query reads. Raises ValueError for what is no PromQL, types included."""
    found = []

    def visit(expression: promql.Expr) -> bool:
        if isinstance(expression, promql.VectorSelector):
            found.append(expression)
        return True

    promql.walk(promql.parse(query), visit)
    return found


def server_selectors() -> list[promql.VectorSelector]:
    """The time series of the server that any panel or alert reads."""
    return [one for query in queries() for one in selectors(query) if one.name not in OF_PROMETHEUS]


def program(name: str) -> str:
    """Where a program of Prometheus is; skips the test if it is not installed."""
    found = prometheus.program(name)
    if found is None:
        pytest.skip(f"{name} is not installed; Debian's package prometheus has it")
    return found
