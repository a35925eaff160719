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
    """Write docs/images/inspector.png."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("tools.screenshots: expected the program chromium, found none")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text(TEXT)
        inspect = [sys.executable, "-m", "vllm_kvevict", "inspect", "--model", str(build_model(SMOLLM2))]
        inspect += ["--prompt-file", str(folder / "text.txt"), "--kv-eviction", "lava", "--kv-budget", "256"]
        inspect += ["--out", str(folder / "page.html"), "--max-model-len", "2048", "--enforce-eager"]
        subprocess.run(inspect, check=True, env={**cpu_environment(), **os.environ})
        browser = [chromium, "--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1100,1250"]
        page = (folder / "page.html").as_uri()
        subprocess.run([*browser, f"--screenshot={IMAGES / 'inspector.png'}", page], check=True)


if __name__ == "__main__":
    main()
