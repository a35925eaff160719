"""The command line: kvevict check, inspect, calibrate and policies."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

# commands, each a module of this folder that is imported only if it is asked for: some import vLLM
_COMMANDS = {
    "check": "Say whether eviction works on this machine.",
    "inspect": "Run one prompt and write a page that shows what its eviction keeps.",
    "calibrate": "Find out how much of a prompt a policy must keep, for --kv-budget auto.",
    "policies": "Print the table of policies.",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``kvevict``. Exits with status 2 and one sentence on stderr if there is nothing to show."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(prog="kvevict", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, what in _COMMANDS.items():
        command = commands.add_parser(name, allow_abbrev=False, help=what)
        if name == next(iter(given), None):
            importlib.import_module(f"vllm_kvevict.commands.{name}").add_arguments(command)
            command.set_defaults(parser=command)
    args, others = parser.parse_known_args(given)
    try:
        for line in args.run(args, others):
            sys.stdout.write(f"{line}\n")
    except (ValueError, OSError) as error:
        args.parser.error(str(error))
