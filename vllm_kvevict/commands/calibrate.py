"""The command ``calibrate``: its flags, and what it runs."""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterator
from dataclasses import astuple, fields
from pathlib import Path
from statistics import mean
from typing import Any

from vllm_kvevict.budgets.curve import fit
from vllm_kvevict.commands.arguments import file_to_write, positive
from vllm_kvevict.options.reading import name_in
from vllm_kvevict.policies import POLICIES


def add_arguments(calibrate: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser; ``args.run`` yields what it has to say."""
    calibrate.description = (
        "Answer prompts of several kinds with parts of them kept, fit the two constants of --kv-budget auto to what "
        "that costs, and write them to a small JSON file. Flags that are not listed here go to vLLM's engine; with "
        "--enforce-eager it starts faster."
    )
    calibrate.add_argument("--model", metavar="M", required=True, help="Model name or folder, with a chat template.")
    calibrate.add_argument("--kv-eviction", metavar="POLICY", type=name_in(POLICIES), required=True, help="The policy.")
    calibrate.add_argument(
        "--out", metavar="FILE", type=file_to_write, required=True, help="The file; others in it stay."
    )
    calibrate.add_argument(
        "--prompt-tokens", metavar="N", type=positive, default=2048, help="Length of the prompts. Default: %(default)s."
    )
    calibrate.add_argument(
        "--prompts", metavar="N", type=positive, default=6, help="Prompts of each kind. Default: %(default)s."
    )
    calibrate.add_argument(
        "--kept",
        metavar="R",
        type=_fraction,
        nargs="+",
        default=[0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9],
        help="Fractions of each prompt to keep. Default: %(default)s.",
    )
    calibrate.add_argument(
        "--points", metavar="FILE", type=file_to_write, help="Write what was measured there, too, as CSV."
    )
    calibrate.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace, engine_flags: list[str]) -> Iterator[str]:
    known = _known(args.out, args.model)
    # read by vLLM when it is imported: the answers are forced inside the worker
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm_kvevict.engine.offline.calibrating import measure

    points = measure(args.model, args.kv_eviction, args.prompt_tokens, args.prompts, args.kept, engine_flags)
    if args.points is not None:
        with args.points.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in fields(points[0])])
            writer.writerows(astuple(point) for point in points)
        yield f"wrote {args.points}"
    prompts = [points[first : first + len(args.kept)] for first in range(0, len(points), len(args.kept))]
    nlls = [of_prompt[0].nll for of_prompt in prompts]
    found = fit(args.kept, nlls, [[point.quality for point in of_prompt] for of_prompt in prompts])
    known["policies"][args.kv_eviction] = found.model_dump()
    args.out.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    for kept in args.kept:
        yield f"kept {kept:.0%} of each prompt: quality {mean(p.quality for p in points if p.kept == kept):.3f}"
    for target in (0.8, 0.9, 0.95):
        yield f"--kv-budget auto for a quality of {target}: {mean(found.fraction(target, nll) for nll in nlls):.0%}"
    yield f"wrote {args.out}: alpha {found.alpha:.3f}, beta {found.beta:.3f}"


def _known(out: Path, model: str) -> dict[str, Any]:
    """Return what the file says so far.

    Raises ValueError if it is of another model, or no calibration.
    """
    if not out.exists():
        return {"model": model, "policies": {}}
    known = json.loads(out.read_text(encoding="utf-8"))
    if not isinstance(known, dict) or not isinstance(known.get("policies"), dict) or known.get("model") != model:
        raise ValueError(f"--out: expected a calibration of {model!r} or no file, found another one in {str(out)!r}")
    return known


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction between 0 and 1, got {text!r}")
    return value
