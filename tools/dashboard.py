"""Draw what the Grafana dashboard shows of a real server: ``python -m tools.dashboard``, some five minutes on a CPU.

Prometheus asks the server as in deploy/, and answers the queries of the panels; matplotlib draws them. It is no
screenshot of Grafana, which no package brings.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from openai import APIStatusError, OpenAI

from tools.build_model import SMOLLM2, build_model
from tools.prometheus import Prometheus, panels
from tools.server import Server

ROOT = Path(__file__).resolve().parents[1]
IMAGE = ROOT / "docs" / "images" / "dashboard.png"
SECONDS, CLIENTS = 150, 6
FLAGS = ["--kv-eviction", "snapkv", "--kv-budget", "256", "--kv-budget-allocator", "adakv"]
FLAGS += ["--max-model-len", "4096", "--enforce-eager", "--dtype", "float32"]


def main() -> None:
    """Write docs/images/dashboard.png."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    model = str(build_model(SMOLLM2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Server(model, folder / "log", *FLAGS) as server, Prometheus(server, folder) as prometheus:
            start = time.time()
            with ThreadPoolExecutor(CLIENTS) as clients:
                for client in range(CLIENTS):
                    clients.submit(load, server.base_url, model, client, start + SECONDS)
            time.sleep(10)  # what an idle server shows
            during = {"start": start, "end": time.time(), "step": 2}
            draw(panels("20s"), lambda query: prometheus.ask("query_range", query=query, **during)["result"], IMAGE)


def load(base_url: str, model: str, client: int, end: float) -> None:
    """Ask for short answers about texts of 200 to 3,500 tokens, one after the other; one in eight asks wrongly."""
    choose = random.Random(client)
    server = OpenAI(base_url=f"{base_url}/v1", api_key="none")
    while time.time() < end:
        text = " ".join(choose.choice(("one", "two", "three", "four")) for _ in range(choose.randint(200, 3500)))
        options = {"kv_budget": choose.choice((128, 256, 1024, -1 if choose.random() < 0.5 else 256))}
        try:
            server.completions.create(
                model=model, prompt=text, max_tokens=choose.randint(8, 64), extra_body={"vllm_xargs": options}
            )
        except APIStatusError:  # the wrong ones
            time.sleep(choose.random())


def draw(shown: list[dict[str, Any]], ask: Callable[[str], Any], image: Path) -> None:
    """Draw panels in their places.

    ask:   PromQL -> the series of an answer of Prometheus to query_range
    image: the file that is written
    """
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in shown)
    figure = plt.figure(figsize=(13, height / 3.2), layout="constrained")
    grid = figure.add_gridspec(height, 24)
    for panel in shown:
        place = panel["gridPos"]
        axes = figure.add_subplot(grid[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]])
        for target in panel["targets"]:
            for series in ask(target["expr"]):
                times, values = zip(*series["values"], strict=True)
                first = times[0]
                axes.plot([at - first for at in times], list(map(float, values)), label=legend(target, series))
        axes.set_title(panel["title"], loc="left", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(image, dpi=90)


def legend(target: dict[str, str], series: dict[str, Any]) -> str:
    """Return the name of a series, as Grafana makes it."""
    return re.sub(r"\{\{(\w+)\}\}", lambda label: series["metric"].get(label[1], ""), target["legendFormat"])


if __name__ == "__main__":
    main()
