"""Make the screenshots of the pages again: ``python -m tools.screenshots``, with Chromium and the model of the demo."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.build_model import SMOLLM2, build_model
from tools.server import cpu_environment

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
TEXT = f"{NOISE * 24}The name of the ship is Aurora. {NOISE * 24}The name of the ship is"


def main() -> None:
    """Write inspector.png and report.png into docs/images."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("tools.screenshots: expected the program chromium, found none")
    browser = [chromium, "--headless=new", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=5000"]
    with tempfile.TemporaryDirectory() as name:
        for image, size, page in (("inspector", "1100,1250", inspector), ("report", "1250,1230", report)):
            show = [f"--window-size={size}", f"--screenshot={IMAGES / image}.png", page(Path(name))]
            subprocess.run([*browser, *show], check=True)


def inspector(folder: Path) -> str:
    """Return the address of a page of ``kvevict inspect``, made in ``folder``."""
    (folder / "text.txt").write_text(TEXT)
    inspect = [sys.executable, "-m", "vllm_kvevict", "inspect", "--model", str(build_model(SMOLLM2))]
    inspect += ["--prompt-file", str(folder / "text.txt"), "--kv-eviction", "lava", "--kv-budget", "256"]
    inspect += ["--out", str(folder / "page.html"), "--max-model-len", "2048", "--enforce-eager"]
    subprocess.run(inspect, check=True, env={**cpu_environment(), **os.environ})
    return (folder / "page.html").as_uri()


def report(folder: Path) -> str:
    """Return the address of a section of the page of measurements, in the site that is made in ``folder``."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder / "site")]
    subprocess.run(build, check=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    section = f"{(folder / 'site' / 'measurements' / 'index.html').as_uri()}#bench_evicted_decode"
    frame = f"<body style='margin:0'><iframe src='{section}' style='border:0;width:100vw;height:100vh'></iframe>"
    (folder / "report.html").write_text(frame)  # without a frame Chromium's picture of a section is empty
    return (folder / "report.html").as_uri()


if __name__ == "__main__":
    main()
