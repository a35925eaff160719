"""The dashboard and the alerts, read by what Grafana and Prometheus read them with, as far as packages have it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.monitoring import PROMETHEUS, ROOT, alerts, dashboard, program, queries, selectors

RULE_TESTS = Path(__file__).with_name("alerts_test.yaml")
PAGE = ROOT / "docs" / "operations.md"


def promtool(*arguments: str | Path) -> str:
    """Run Prometheus' own checker and return what it prints."""
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_reads_its_configuration() -> None:
    said = promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert f"{len(alerts())} rules found" in said


def test_alerts_fire_when_they_should_and_never_on_a_healthy_server() -> None:
    promtool("test", "rules", RULE_TESTS)
    fire = [test["promql_expr_test"][-1]["exp_samples"] for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]]
    assert fire[0] == [] and len(fire[1]) == len(alerts())


def lost(given: Any, known: Any, path: str = "") -> Iterator[str]:
    """The paths of what one JSON value has and another has not."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            yield from lost(value, known[key], f"{path}.{key}") if key in known else [f"{path}.{key}"]
    elif isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        for place, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from lost(one, other, f"{path}[{place}]")
    elif given != known:
        yield path


def test_the_dashboard_has_only_what_grafana_knows() -> None:
    """Read and written by the classes that Grafana makes of its schema, which drop everything else."""
    register_default_plugins()
    written = JSONEncoder().encode(Dashboard.from_json(dashboard()))
    assert not list(lost(dashboard(), json.loads(written)))


def test_panels_read_a_data_source_that_is_chosen_on_the_dashboard() -> None:
    """Grafana asks for ``__inputs`` in its dialog only: provisioned, panels that name one would find no data."""
    (variable,) = dashboard()["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    sources = [panel["datasource"] for panel in dashboard()["panels"]]
    assert all(source == {"type": "prometheus", "uid": f"${{{variable['name']}}}"} for source in sources)


def test_panels_stand_side_by_side() -> None:
    places = [tuple(panel["gridPos"].values()) for panel in dashboard()["panels"]]
    assert places == [(8, 12, 12 * (place % 2), 8 * (place // 2)) for place in range(len(places))]
    assert [panel["id"] for panel in dashboard()["panels"]] == list(range(1, len(places) + 1))


@pytest.mark.parametrize("query", queries())
def test_queries_are_promql(query: str) -> None:
    assert selectors(query)


def test_the_page_says_of_every_alert_what_to_do() -> None:
    section = PAGE.read_text().partition("\n### Alerts\n")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:4] for row in section.splitlines() if row.startswith("| `")]
    assert [name.strip(" `") for name, _, _ in rows] == list(alerts())
    assert [severity.strip() for _, severity, _ in rows] == [rule["labels"]["severity"] for rule in alerts().values()]


def test_the_page_names_every_panel_that_there_is() -> None:
    section = PAGE.read_text().partition("\n### Panels\n")[2].partition("\n### ")[0]
    rows = [row.split("|")[1].strip() for row in section.splitlines() if row.startswith("| ")]
    assert rows[1:] == [panel["title"] for panel in dashboard()["panels"]]
