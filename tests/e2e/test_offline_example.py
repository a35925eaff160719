"""The example without a server runs from top to bottom, and says what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools.server import cpu_environment


@pytest.mark.more("half a minute; the README's own lines are tested in `make test`")
def test_it_answers_with_a_part_of_the_prompt(smollm2: Path) -> None:
    environment = {**cpu_environment(), **os.environ, "MODEL": str(smollm2)}
    command = [sys.executable, str(ROOT / "examples" / "offline.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    answers = re.findall(r"^(.*): (\d+) tokens -> (.*)$", done.stdout, re.M)
    assert len(answers) == 6 and all(int(count) > 1900 and "Aurora" in answer for _, count, answer in answers[:2])
    assert int(re.search(r"^blocks given back: (\d+)$", done.stdout, re.M)[1]) > 50
