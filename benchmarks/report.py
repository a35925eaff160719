"""The report beside the numbers: benchmarks/results/README.md and its figures, made from the CSV files there.

python -m benchmarks.report
"""

from __future__ import annotations

import argparse
import ast
import csv
import re
from pathlib import Path

from benchmarks.timing import RESULTS

BENCHMARKS = Path(__file__).parent
ROOT = BENCHMARKS.parent
MOST_ROWS = 12  # in a table; the CSV file has all of them
PROVENANCE = {"machine": "", "threads": "threads ", "torch": "torch ", "vllm": "vLLM ", "commit": "commit "}
# what a figure shows: a line or bar for each value of the first column, over the second, of the mean of the third
FIGURES = {
    "concurrency": ("engine", None, "mean"),
    "decode": ("allocator", None, "step_ms"),
    "evicted_decode": ("arm", None, "step_ms"),
    "eviction_cost": ("policy", "prompt", "share"),
    "multi_turn": ("budget", None, "seconds_to_first_token"),
    "overhead": ("arm", None, "step_ms"),
    "quality_allocators": ("allocator", "kept", "accuracy"),
    "quality_auto": ("arm", "kept", "quality"),
    "quality_schedules": ("policy", "kept", "accuracy"),
}
HEADER = """# Results

Made by `python -m benchmarks.report` from the CSV files in this folder, to which every run of a benchmark adds rows.
`make bench` runs all benchmarks and then this. A table shows the rows of a machine's last commit, at most {most}.
"""


def scripts() -> list[Path]:
    """Every script that measures something, in the order of the report."""
    named = [*BENCHMARKS.glob("*/bench_*.py"), BENCHMARKS / "serving" / "soak.py"]
    return [*sorted(named), *sorted(BENCHMARKS.glob("*/gpu_*.py"))]


def results_of(script: Path, folder: Path) -> list[Path]:
    """Return where a script's rows are: files of its name, with "quality_" ahead for the studies of quality; others
    behind an underscore are of its parts, but for the rows of single prompts.
    """
    prefix = "quality_" if script.parent.name == "quality" else ""
    stem = f"{prefix}{script.stem.removeprefix('bench_')}"
    parts = [path for path in sorted(folder.glob(f"{stem}_*.csv")) if not path.stem.endswith("_prompts")]
    return [folder / f"{stem}.csv", *parts]


def section(script: Path, folder: Path) -> str:
    """Return what a script measures, how to run it, and its latest rows; draws its figure into ``folder``."""
    what = (ast.get_docstring(ast.parse(script.read_text())) or "").split("\n\n")[0].replace("\n", " ")
    module = ".".join(script.relative_to(ROOT).with_suffix("").parts)
    parts = [f"## {script.stem}", re.sub(r": python -m .*", ".", what), f"`python -m {module}`"]
    written = [path for path in results_of(script, folder) if read(path)]
    for path in written:
        parts += [f"### {path.stem}"] if len(written) > 1 else []
        parts += tables(path)
    return "\n\n".join(parts if written else [*parts, "No rows yet."])


def tables(path: Path) -> list[str]:
    """Return the latest rows of each machine in a file, and its figure if there is one."""
    parts, rows = [], read(path)
    for latest in by_machine(rows).values():
        stated = [f"{label}{latest[-1][name]}" for name, label in PROVENANCE.items() if latest[-1].get(name)]
        shown = latest[-MOST_ROWS:]
        left_out = f"; the last {len(shown)} of {len(latest)} rows" if len(shown) < len(latest) else ""
        parts += [f"{', '.join(stated)}{left_out}:" if stated else "", table(shown)]
    if draw(path, rows):
        parts.append(f"![{path.stem}]({path.stem}.png)")
    return [part for part in parts if part]


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def by_machine(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Return each machine's rows of the commit that was measured last there."""
    machines: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        machines.setdefault(row.get("machine", ""), []).append(row)
    return {name: [row for row in of if row.get("commit") == of[-1].get("commit")] for name, of in machines.items()}


def table(rows: list[dict[str, str]]) -> str:
    """Return rows as a markdown table, without what is the same for all of a machine's."""
    names = [name for name in rows[0] if name and name not in (*PROVENANCE, "tree")]
    lines = [names, ["---"] * len(names), *([shortened(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shortened(value: str | None) -> str:
    """Return a number with four digits, anything else as it is."""
    return f"{float(value):.4g}" if value and re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", value) else value or ""


def draw(path: Path, rows: list[dict[str, str]]) -> bool:
    """Draw the figure of the last machine's latest rows beside ``path``; return whether there is one."""
    target = path.with_suffix(".png")
    if path.stem not in FIGURES and "native_median_ms" not in rows[0]:
        return target.exists()  # drawn by the benchmark itself
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    latest = by_machine(rows)[rows[-1].get("machine", "")]
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    if path.stem not in FIGURES:
        last = latest[-1]
        axes.barh(["native", "reference"], [float(last[f"{name}_median_ms"]) for name in ("native", "reference")])
        axes.set_xlabel("ms, median of the last row")
    else:
        line, over, value = FIGURES[path.stem]
        for place, name in enumerate(dict.fromkeys(row[line] for row in latest)):
            points: dict[float, list[float]] = {}
            for row in latest:
                if row[line] == name:
                    points.setdefault(float(row[over]) if over else 0.0, []).append(float(row[value]))
            means = [sum(values) / len(values) for _, values in sorted(points.items())]
            if over is None:
                axes.barh([name], means)
            else:
                axes.plot(sorted(points), means, "-" if place < 10 else "--", marker=".", label=name)  # colours repeat
        (axes.set_xlabel if over is None else axes.set_ylabel)(f"{value}, mean")
        if over is not None:
            axes.set_xlabel(over)
            axes.legend(fontsize="xx-small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(target, dpi=80)
    pyplot.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files, and of the report")
    folder = parser.parse_args().results
    sections = [section(script, folder) for script in scripts()]
    (folder / "README.md").write_text("\n".join([HEADER.format(most=MOST_ROWS), "\n\n".join(sections), ""]))


if __name__ == "__main__":
    main()
