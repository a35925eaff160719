"""The command line: ``kvevict check``, ``inspect``, ``calibrate`` and ``policies``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vllm_kvevict.commands.calibrate import add_calibrate
from vllm_kvevict.commands.check import add_check
from vllm_kvevict.commands.inspect import add_inspect
from vllm_kvevict.commands.policies import markdown_table, text_table, with_table


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``kvevict``. Exits with status 2 and one sentence on stderr if there is nothing to show."""
    is_script = Path(sys.argv[0]).name == "kvevict"
    parser = _Parser(prog="kvevict" if is_script else "python -m vllm_kvevict", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (add_check(commands), add_inspect(commands), add_calibrate(commands), _add_policies(commands)):
        command.set_defaults(parser=command)
    args, others = parser.parse_known_args(arguments)
    try:
        for line in args.run(args, others):
            sys.stdout.write(f"{line}\n")
    except (ValueError, OSError) as error:
        args.parser.error(str(error))


def _add_policies(commands: Any) -> argparse.ArgumentParser:
    policies: argparse.ArgumentParser = commands.add_parser(
        "policies",
        allow_abbrev=False,
        help="Print the table of policies.",
        description="Print the policies: what they need, protect and hold in memory, their sources and options.",
    )
    form = policies.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="Print it in Markdown.")
    form.add_argument(
        "--write", metavar="FILE", type=Path, help="Put its short form between the markers in FILE, docs/policies.md."
    )
    policies.set_defaults(run=_policies)
    return policies


def _policies(args: argparse.Namespace, others: list[str]) -> Iterator[str]:
    if others:
        raise ValueError(f"unrecognized arguments: {' '.join(others)}")
    if args.write is None:
        yield markdown_table() if args.markdown else text_table()
        return
    args.write.write_text(with_table(args.write.read_text(encoding="utf-8")), encoding="utf-8")
    yield f"wrote {args.write}"
