"""List what a vLLM breaks of this package, without installing it: ``python -m tools.upstream 0.34.0``."""

from __future__ import annotations

import argparse
import gc

from packaging.version import Version

from tools.newest_vllm import NEWEST, NoWheelError
from tools.upstream.checks import findings
from tools.upstream.ours import Upstream
from tools.upstream.sources import installed_vllm, our_sources, vllm_sources


def main(wanted: str) -> str | None:
    """Print what breaks, a line for each; return a sentence for stderr, and so exit status 1, if anything does."""
    ours, installed = our_sources(), installed_vllm()
    try:
        newest = Upstream(ours, vllm_sources(NEWEST)) if Version(wanted) < Version(NEWEST) else None
        upstream = Upstream(ours, vllm_sources(wanted), newest)
        found = findings(upstream)
        if Version(installed) < Version(wanted):  # names that were ours so far
            found |= findings(Upstream(ours, vllm_sources(installed), upstream), ["collisions"])
    except NoWheelError as error:
        return str(error)
    for name, broken in found.items():
        print(f"{name}: {len(broken) or 'nothing'}")
        for finding in broken:
            print(f"  {finding}")
    total = sum(map(len, found.values()))
    return f"vllm {wanted} breaks {total} thing{'s' * (total > 1)}" if total else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.upstream", description=__doc__)
    parser.add_argument("version", nargs="?", default=installed_vllm(), help="of vLLM; default: the installed one")
    gc.disable()  # syntax trees are many objects, and none of it garbage
    raise SystemExit(main(parser.parse_args().version))
