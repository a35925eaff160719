"""Drop the machine code of other GPUs from a compiled CUDA extension: zeros in its place, which compress to nothing.

NVIDIA does not publish the format. The layout is that of CUDA 11 to 13 as others have found it out (for example
FORMAT_SPECIFICATION.md of github.com/GrigoryEvko/nvopen-tools): containers of a header and entries, each entry with a
header of its own that names the kind of its code and the architecture. The file keeps its size and every container its
place, since the extension points to them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all entries
_ENTRY = struct.Struct("<HHIQ")  # kind, version, bytes of this header, bytes of the code
_ARCHITECTURE = struct.Struct("<I")
_ARCHITECTURE_OFFSET = 28  # in an entry's header; 90 for sm_90 and for sm_90a
_ENTRIES_SIZE_OFFSET = 8  # in a container's header
_MACHINE_CODE = 2  # kind of an entry; 1 is PTX
# magic, version 1, header of 16 bytes: eight bytes that do not occur by chance
_START = struct.pack("<IHH", 0xBA55ED50, 1, _CONTAINER.size)


@dataclass(frozen=True)
class _Entry:
    """Bytes ``start`` to ``end`` of a file: a header and GPU code of one kind and architecture."""

    kind: int
    architecture: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def keep_architecture(content: bytearray, architecture: int) -> tuple[int, int]:
    """Drop, from ``content``, the GPU code that ``architecture`` (90 for sm_90) does not run.

    A container that has machine code of the architecture becomes as if it had been compiled for that alone. Another
    keeps the smallest machine code that it has: CUDA finds nothing there that fits, as in the whole file, if it was not
    for PTX. One that has PTX alone keeps it.

    content: a shared object, changed in place

    Returns the bytes of entries kept and of those dropped. Raises ValueError if a container or an entry reaches past
    what holds it.
    """
    kept = dropped = 0
    start = content.find(_START)
    while start >= 0:
        _, _, header_size, entries_size = _CONTAINER.unpack_from(content, start)
        first, end = start + header_size, start + header_size + entries_size
        entries = list(_entries(content, first, end))
        left = _wanted(entries, architecture)
        size = sum(entry.size for entry in left)
        kept, dropped = kept + size, dropped + sum(entry.size for entry in entries) - size
        packed = b"".join(content[entry.start : entry.end] for entry in left)
        struct.pack_into("<Q", content, start + _ENTRIES_SIZE_OFFSET, len(packed))
        content[first:end] = packed.ljust(entries_size, b"\0")
        start = content.find(_START, end)
    return kept, dropped


def _wanted(entries: list[_Entry], architecture: int) -> list[_Entry]:
    machine_code = [entry for entry in entries if entry.kind == _MACHINE_CODE]
    fitting = [entry for entry in machine_code if entry.architecture == architecture]
    return fitting or sorted(machine_code, key=lambda entry: entry.size)[:1] or entries


def _entries(content: bytearray, start: int, end: int) -> Iterator[_Entry]:
    if end > len(content):
        raise ValueError(f"the GPU code at byte {start} ends at {end}, past the file's {len(content)} bytes")
    while start < end:
        kind, _, header_size, code_size = _ENTRY.unpack_from(content, start)
        (architecture,) = _ARCHITECTURE.unpack_from(content, start + _ARCHITECTURE_OFFSET)
        entry = _Entry(kind, architecture, start, start + header_size + code_size)
        if header_size < _ARCHITECTURE_OFFSET + _ARCHITECTURE.size or entry.end > end:
            raise ValueError(f"expected an entry that ends by byte {end}, got one from {start} to {entry.end}")
        yield entry
        start = entry.end
