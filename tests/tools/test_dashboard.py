"""The drawn dashboard has every panel, in its place and with the names that Grafana gives its series."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tests.monitoring import dashboard
from tools.dashboard import draw
from tools.prometheus import panels


def test_every_panel_and_series_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plt.figure()
    monkeypatch.setattr(plt, "figure", lambda **options: figure)
    asked = []

    def ask(query: str) -> list[dict[str, object]]:
        asked.append(query)
        return [
            {
                "metric": {"policy": "snapkv", "allocator": "adakv", "option": "kv_budget", "alertname": "x"},
                "values": [[5, "1"], [7, "NaN"], [9, "2"]],
            }
        ]

    draw(panels("20s"), ask, tmp_path / "dashboard.png")
    assert (tmp_path / "dashboard.png").is_file() and not [query for query in asked if "$" in query]
    assert [axes.get_title(loc="left") for axes in figure.axes] == [panel["title"] for panel in dashboard()["panels"]]
    assert len(asked) == sum(len(panel["targets"]) for panel in dashboard()["panels"])
    assert figure.axes[0].get_lines()[0].get_label() == "prompts: snapkv + adakv"
    assert list(figure.axes[0].get_lines()[0].get_xdata()) == [0, 2, 4]
