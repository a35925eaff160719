"""The model matrix: every family through the real engine, one process after the other, and a row of matrix.csv each.

python -m tools.matrix            families that have no row yet
python -m tools.matrix --again    all
python -m tools.matrix --only Qwen3 "Gemma 3"
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.matrix.families import FAMILIES, Family
from tools.matrix.rows import CSV, FIELDS, read_rows

ROOT = Path(__file__).resolve().parents[2]
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRITON_INTERPRET": "1",
}


def row_of(family: Family, deadline: float) -> dict[str, str]:
    """Run one family. What a process that dies or takes too long has found is kept, and the reason with it."""
    row = {"family": family.name, "mechanism": family.mechanism}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", "tools.matrix.trial", family.name, str(file)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **_ENVIRONMENT}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=deadline, check=False
            )
            if done.returncode == -signal.SIGTERM:  # somebody else's, which says nothing of the family
                raise KeyboardInterrupt
            ended = "" if done.returncode == 0 else f"ended by {done.returncode}: {_last_line(done.stderr)}"
        except subprocess.TimeoutExpired:
            ended = f"no answer within {deadline:.0f} seconds"
        found = json.loads(file.read_text()) if file.exists() else {}
    return row | found | {"ended": ended}


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")[:200]


def write_rows(rows: dict[str, dict[str, str]]) -> None:
    """Write the rows in the order of the families."""
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[family.name] for family in FAMILIES if family.name in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[family.name for family in FAMILIES])
    parser.add_argument("--again", action="store_true", help="families that have a row as well")
    parser.add_argument("--deadline", type=float, default=300.0, metavar="SECONDS", help="of one family")
    arguments = parser.parse_args()
    rows = read_rows()
    for family in FAMILIES:
        is_due = family.name in arguments.only if arguments.only else arguments.again or family.name not in rows
        if not is_due:
            continue
        rows[family.name] = row = row_of(family, arguments.deadline)
        write_rows(rows)
        answers = {name: text for name, text in row.items() if name not in ("family", "mechanism", "versions")}
        print(f"{family.name}: {json.dumps(answers)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
