"""Put up Debian's Prometheus for a while, with the configuration of deploy/, beside a server."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode
from urllib.request import urlopen

from tools.server import HOST, Server, free_port

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = ROOT / "configs" / "grafana_dashboard.json"
CONFIGURATION = ROOT / "deploy" / "prometheus"
EXTRACTED = ROOT / ".cache" / "prometheus" / "usr" / "bin"  # by .ci/run, from Debian's package


def panels(rate_interval: str) -> list[dict[str, Any]]:
    """Return the panels of the Grafana dashboard, with a duration in place of Grafana's variable."""
    text = DASHBOARD.read_text().replace("$__rate_interval", rate_interval)
    found: list[dict[str, Any]] = json.loads(text)["panels"]
    return found


def program(name: str) -> str | None:
    """Return where a program of Prometheus is, None where it is not installed."""
    return shutil.which(name) or shutil.which(name, path=EXTRACTED)


class Prometheus:
    """``with Prometheus(server, folder) as prometheus:`` asks ``server`` every second inside the block.

    folder: for its configuration, data and log

    Raises FileNotFoundError where Prometheus is not installed.
    """

    def __init__(self, server: Server, folder: Path) -> None:
        text = (CONFIGURATION / "prometheus.yml").read_text()
        text = text.replace("server:8000", server.base_url.removeprefix("http://"))
        (folder / "prometheus.yml").write_text(text.replace("interval: 15s", "interval: 1s"))
        shutil.copy(CONFIGURATION / "alerts.yaml", folder)
        self.folder = folder
        self.address = f"{HOST}:{free_port()}"

    def __enter__(self) -> Self:
        found = program("prometheus")
        if found is None:
            raise FileNotFoundError("prometheus is not installed; Debian's package of that name has it")
        files = [f"--config.file={self.folder}/prometheus.yml", f"--storage.tsdb.path={self.folder}/data"]
        command = [found, *files, f"--web.listen-address={self.address}"]
        with (self.folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait()

    def ask(self, what: str, **parameters: Any) -> Any:
        """Return what its API answers; raises URLError while it starts."""
        url = f"http://{self.address}/api/v1/{what}?{urlencode(parameters)}"
        with urlopen(url, timeout=10) as response:
            return json.load(response)["data"]
