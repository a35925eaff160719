"""List what a vLLM breaks of this package, without installing it: ``python -m tools.upstream 0.34.0``."""

from __future__ import annotations

import argparse

from tools.upstream.checks import findings
from tools.upstream.ours import Upstream
from tools.upstream.sources import NoWheelError, installed_vllm, our_sources, vllm_sources


def main(wanted: str) -> str | None:
    """Print what breaks, a line for each; return a sentence for stderr, and so exit status 1, if anything does."""
    try:
        found = findings(Upstream(our_sources(), vllm_sources(wanted)))
    except NoWheelError as error:
        return str(error)
    for name, broken in found.items():
        print(f"{name}: {len(broken) or 'nothing'}")
        for finding in broken:
            print(f"  {finding}")
    total = sum(map(len, found.values()))
    return f"vllm {wanted}: {total} things break" if total else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.upstream", description=__doc__)
    parser.add_argument("version", nargs="?", default=installed_vllm(), help="of vLLM; default: the installed one")
    raise SystemExit(main(parser.parse_args().version))
