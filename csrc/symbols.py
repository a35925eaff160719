"""What the libraries in a wheel ask of the system that loads them: for the build, which names the wheel by it, and for
the test that looks at a built one.
"""

import re
import subprocess
from pathlib import Path

# The newest versions of symbols that manylinux_2_28 has: those of AlmaLinux 8 (PEP 600)
MANYLINUX, NEWEST = "manylinux_2_28", {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}
# libraries that are not in the wheel: the system's, and those that torch has brought into the process by then
FOUND = ("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2")
FOUND += ("libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1", "libcudart.so")
_VERSION = re.compile(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)\b")
_NEEDED = re.compile(r"NEEDED\s+(\S+)")


def too_new(library: Path) -> list[str]:
    """Return what a library asks for that manylinux_2_28 does not have, by objdump."""
    symbols, needed = (
        subprocess.run(["objdump", option, library], capture_output=True, text=True, check=True).stdout
        for option in ("-T", "-p")
    )
    versions = {(name, tuple(map(int, number.split(".")))) for name, number in _VERSION.findall(symbols)}
    newer = [f"{name}_{'.'.join(map(str, number))}" for name, number in versions if number > NEWEST[name]]
    return sorted(newer) + [name for name in _NEEDED.findall(needed) if not name.startswith(FOUND)]
