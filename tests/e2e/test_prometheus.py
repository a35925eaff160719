"""Prometheus itself, with our configuration, asks a server, and every query of the dashboard finds something."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest

from tests.monitoring import alerts, panel_queries, program
from tools.prometheus import Prometheus
from tools.server import Server


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[Prometheus]:
    program("prometheus")
    with Prometheus(server, tmp_path) as running:
        yield running


def test_every_panel_has_something_to_show(prometheus: Prometheus) -> None:
    waiting, deadline = {query for query in panel_queries() if "ALERTS" not in query}, time.monotonic() + 60
    while waiting and time.monotonic() < deadline:
        time.sleep(1)
        try:
            waiting = {query for query in waiting if not prometheus.ask("query", query=query)["result"]}
        except URLError:  # it is starting
            continue
    assert not waiting
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(alerts(), "ok")
    assert [target["health"] for target in prometheus.ask("targets")["activeTargets"]] == ["up"]
