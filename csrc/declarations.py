"""The declarations of the C interface in csrc, in the words of vllm_kvevict/kernels/interface.py: for the build, which
puts their digest into the library, and for the test that compares the two.
"""

import re
from pathlib import Path

_FUNCTION = re.compile(r'extern "C" __attribute__\(\(visibility\("default"\)\)\) int32_t (\w+)\(([^)]*)\)')
_VALUES = ("int32_t", "int64_t", "float")


def declarations(folder: Path) -> list[str]:
    """Return a line for each function that the sources in ``folder`` export.

    Raises ValueError for an argument that is neither a pointer, a stream, int32_t, int64_t nor float.
    """
    found = []
    for source in sorted(folder.glob("*.c[pu]*")):
        for name, arguments in _FUNCTION.findall(source.read_text()):
            found.append(f"{name}({', '.join(_kind(each) for each in arguments.split(','))})")
    return found


def _kind(argument: str) -> str:
    kind = argument.split()[0]
    if "*" in argument or kind == "cudaStream_t":
        return "pointer"
    if kind not in _VALUES:
        raise ValueError(f"expected a pointer, a stream or one of {', '.join(_VALUES)}; got {argument.strip()!r}")
    return kind
