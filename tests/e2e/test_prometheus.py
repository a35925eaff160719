"""Prometheus itself, with our configuration, asks a server, and every query of the dashboard finds something."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from tests.monitoring import PROMETHEUS, alerts, panel_queries, program
from tools.server import HOST, Server, free_port


@pytest.fixture
def ask(server: Server, tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Ask Prometheus' API; it scrapes the server of these tests every second."""
    text = (PROMETHEUS / "prometheus.yml").read_text()
    text = text.replace("server:8000", server.base_url.removeprefix("http://")).replace("interval: 15s", "interval: 1s")
    (tmp_path / "prometheus.yml").write_text(text)
    (tmp_path / "alerts.yaml").write_text((PROMETHEUS / "alerts.yaml").read_text())
    url = f"{HOST}:{free_port()}"
    flags = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    command = [program("prometheus"), *flags, f"--web.listen-address={url}"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:

        def answer(path: str) -> Any:
            with urlopen(f"http://{url}/api/v1/{path}", timeout=10) as response:
                return json.load(response)["data"]

        yield answer
        process.terminate()


def test_every_panel_has_something_to_show(ask: Callable[[str], Any]) -> None:
    waiting, deadline = {query for query in panel_queries() if "ALERTS" not in query}, time.monotonic() + 60
    while waiting and time.monotonic() < deadline:
        time.sleep(1)
        try:
            waiting = {query for query in waiting if not ask(f"query?query={quote(query)}")["result"]}
        except URLError:  # it is starting
            continue
    assert not waiting
    rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(alerts(), "ok")
    assert [target["health"] for target in ask("targets")["activeTargets"]] == ["up"]
