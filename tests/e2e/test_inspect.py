"""``kvevict inspect`` as a user runs it, on a tiny model; its page in a real browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.e2e.prompts import long_text
from tests.tiny_llama import random_prompt
from vllm_kvevict.commands.main import main

CHROMIUM = Path("/usr/bin/chromium")
NUM_TOKENS, BUDGET = 700, 128
ENGINE = ("--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20))


def inspect(model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_kvevict", "inspect", "--model", str(model), *flags, *ENGINE]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompt") / "tokens.json"
    file.write_text(json.dumps(random_prompt(NUM_TOKENS, seed=0)))
    return file


@pytest.fixture(scope="module")
def report(tiny_llama: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspect") / "report.html"
    prompt = ("--prompt-tokens", str(tokens), "--out", str(out), "--dtype", "float32")
    flags = ("--kv-eviction", "lava", "--kv-budget", str(BUDGET), "--max-tokens", "5", "--png")
    done = inspect(tiny_llama, *prompt, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"wrote {out}" in done.stdout
    return out


def num_colours(image: Image.Image) -> int:
    return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))


def test_the_page_shows_what_the_engine_did(report: Path) -> None:
    html = report.read_text()
    rows = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", html))
    kept = 3 * 32 + NUM_TOKENS % 32
    assert rows["prompt tokens"] == str(NUM_TOKENS)
    assert rows["kept tokens per head, mean"] == f"{kept:.1f}"
    assert int(rows["kept tokens per head, smallest"]) <= kept <= int(rows["kept tokens per head, largest"])
    assert (rows["blocks before"], rows["blocks after"]) == ("22", "4")
    freed_bytes = 18 * 32 * 2 * 2 * (2 * 32 * 4)  # blocks, tokens, layers, KV heads; K and V of 32 float32
    assert rows["bytes saved"].startswith(f"{freed_bytes:,} ")
    assert 0 < float(rows["score kept, mean over layers"].rstrip("%")) <= 100
    assert float(rows["eviction, milliseconds (a first run)"]) > 0
    assert re.fullmatch(r"token ids( \d+){1,5}", rows["answer"])
    assert "http://" not in html and "https://" not in html


def test_the_charts_are_in_the_page_and_next_to_it(report: Path) -> None:
    images = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", report.read_text())]
    files = [report.with_name(f"report-{name}.png") for name in ("pages", "kept", "score")]
    assert images == [file.read_bytes() for file in files]
    assert all(num_colours(Image.open(io.BytesIO(image))) > 5 for image in images)


def test_a_prompt_that_fits_its_budget_is_one_sentence(
    tiny_llama: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    flags = ["--prompt-tokens", str(tokens), "--out", str(out), "--kv-eviction", "snapkv", "--kv-budget", "1024"]
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--model", str(tiny_llama), *flags, "--dtype", "float32", *ENGINE])
    assert ended.value.code == 2 and not out.exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"kv_budget: 1024 holds the whole prompt of {NUM_TOKENS} tokens, so nothing was evicted" in last


@pytest.mark.more("4,000 tokens of a real model: the page of a tiny one is the same, and e2e/test_smollm2.py is ragged")
def test_a_real_model_s_budgets_differ_by_more_than_four_times(smollm2: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "report.html", tmp_path / "prompt.txt"
    text.write_text(long_text(252))
    prompt = ("--prompt-file", str(text), "--out", str(out))
    done = inspect(smollm2, *prompt, "--kv-eviction", "lava", "--kv-budget", "256")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", out.read_text()))
    assert 3900 < int(rows["prompt tokens"]) < 4300
    least, most = rows["kept tokens per head, smallest"], rows["kept tokens per head, largest"]
    assert int(most) > 4 * int(least)
    assert int(rows["blocks after"]) in (8, 9)
    check_screenshot(out, tmp_path)


def test_a_browser_shows_the_charts(report: Path, tmp_path: Path) -> None:
    check_screenshot(report, tmp_path)


def check_screenshot(report: Path, tmp_path: Path) -> None:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    screenshot = tmp_path / "screenshot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2400", f"--screenshot={screenshot}"]
    subprocess.run([str(CHROMIUM), *flags, report.as_uri()], check=True, capture_output=True, timeout=120)
    image = Image.open(screenshot)
    assert num_colours(image) > 100
    # each chart's own colours: both ends of the heat maps, and the bars
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((68, 1, 84), (253, 231, 37), (59, 110, 168)):
        assert (np.abs(pixels - colour).max(axis=1) <= 3).sum() > 200, colour
