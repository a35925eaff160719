"""Run a real CUDA engine on a machine with one Hopper GPU and no network: docs/gpu.md says how.

python -m tools.gpu pack                 build what that machine lacks, .cache/gpu/pack.tar.xz
python -m tools.gpu run --out FOLDER     there: every run within nine minutes, then the verdict
python -m tools.gpu compare FILE...      the verdict on results.jsonl files again; a later file's runs count
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tools.gpu.compare import checks
from tools.gpu.results import RESULTS, Record, read
from tools.gpu.runs import FULL, PACK, REFERENCE, ROOT, RUNS, TINY, on_cpu
from tools.gpu.session import Session, unpack

SECONDS = 540
CPU_SECONDS = 3600


def known_run(name: str) -> str:
    if name not in {run.name for run in RUNS}:
        raise argparse.ArgumentTypeError(f"unknown run: {name}")
    return name


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pack", help="build the pack")
    run = commands.add_parser("run", help="carry out the runs")
    run.add_argument("names", nargs="*", type=known_run, help=f"of {', '.join(run.name for run in RUNS)}; default: all")
    run.add_argument("--out", type=Path, required=True, help="folder for results.jsonl and logs.tar.xz")
    run.add_argument("--seconds", type=float, default=SECONDS, help="for everything; default: %(default)s")
    run.add_argument("--eager", action="store_true", help="no graphs and no torch.compile in any run")
    run.add_argument("--compile-backend", help="of torch.compile in every run with graphs; `eager` compiles nothing")
    run.add_argument("--attention", help="--attention-backend of every run")
    where = run.add_mutually_exclusive_group()
    where.add_argument("--dry-run", action="store_true", help="the same list on CPU, with a tiny model")
    where.add_argument("--reference", action="store_true", help="on CPU, at full size, what a GPU is compared with")
    compare = commands.add_parser("compare", help="print the verdict; exit status 1 if a check failed")
    compare.add_argument("results", type=Path, nargs="+", help="results.jsonl of one or more sessions")
    compare.add_argument("--reference", type=Path, help="results.jsonl of `run --reference`")
    parsed = parser.parse_args(arguments)
    if parsed.command == "pack":
        from tools.gpu.pack import build_pack

        pack = build_pack()
        print(f"{pack.relative_to(ROOT)}: {pack.stat().st_size / 2**20:.1f} MiB")
        return 0
    if parsed.command == "compare":
        return verdict(read(parsed.results), None if parsed.reference is None else read([parsed.reference]))
    return carry_out(parsed, f"python -m tools.gpu {' '.join(arguments)}")


def carry_out(parsed: argparse.Namespace, command: str) -> int:
    """Do what ``run`` was asked for; return the exit status."""
    start = time.monotonic()
    on_a_cpu = parsed.dry_run or parsed.reference
    wanted = parsed.names or (REFERENCE if parsed.reference else [run.name for run in RUNS])
    runs = [run for run in RUNS if run.name in wanted]
    if parsed.eager:
        runs = [replace(run, graphs=False) for run in runs]
    if parsed.compile_backend:
        runs = [replace(run, compile_backend=parsed.compile_backend) if run.graphs else run for run in runs]
    if parsed.attention:
        runs = [replace(run, attention=parsed.attention) for run in runs]
    if on_a_cpu:
        runs, scratch, site = [on_cpu(run) for run in runs], parsed.out / "scratch", None
    else:
        scratch = Path(tempfile.gettempdir()) / "kvevict-gpu"
        site = unpack(PACK, scratch)
    seconds = CPU_SECONDS if on_a_cpu else parsed.seconds - (time.monotonic() - start)
    # a process past its limit is aborted, and the core of one that uses a GPU is large
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    session = Session(parsed.out.resolve(), scratch.resolve(), seconds, site, parsed.dry_run, command)
    session.carry_out(runs, TINY if parsed.dry_run else FULL)
    records = read([parsed.out / RESULTS])
    if parsed.reference:
        return 0 if all(record.status == "ended" for record in records.values()) else 1
    return verdict(records)


def verdict(records: Mapping[str, Record], reference: Mapping[str, Record] | None = None) -> int:
    """Print every check and the sum of them; return 1 if one failed."""
    found = list(checks(records, reference))
    print("\n".join(map(str, found)))
    failed = sum(check.passed is False for check in found)
    if any(record.dry_run for record in records.values()):
        print("THIS WAS A DRY RUN ON CPU, with a tiny model: it says nothing about a GPU")
    print(f"{failed} of {sum(check.passed is not None for check in found)} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
