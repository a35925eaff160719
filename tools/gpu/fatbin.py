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
    """Bytes ``start`` to ``end`` of a file: a header, and from ``code`` on GPU code of one kind and architecture."""

    kind: int
    architecture: int
    start: int
    code: int
    end: int


def keep_architecture(content: bytearray, architecture: int) -> tuple[int, int]:
    """Drop, from ``content``, all GPU code that is not machine code of ``architecture`` (90 for sm_90).

    A container that has the architecture becomes as if it had been compiled for that alone. One that has it not keeps
    its headers, so that CUDA finds nothing that fits there, as before.

    content: a shared object, changed in place

    Returns the bytes of GPU code kept and those dropped. Raises ValueError if a container or an entry reaches past what
    holds it, or if nothing is kept although there was GPU code.
    """
    kept = dropped = 0
    start = content.find(_START)
    while start >= 0:
        _, _, header_size, entries_size = _CONTAINER.unpack_from(content, start)
        first, end = start + header_size, start + header_size + entries_size
        entries = list(_entries(content, first, end))
        wanted = [entry for entry in entries if (entry.kind, entry.architecture) == (_MACHINE_CODE, architecture)]
        size = sum(entry.end - entry.code for entry in wanted)
        kept, dropped = kept + size, dropped + sum(entry.end - entry.code for entry in entries) - size
        if wanted:
            packed = b"".join(content[entry.start : entry.end] for entry in wanted)
            struct.pack_into("<Q", content, start + _ENTRIES_SIZE_OFFSET, len(packed))
            content[first:end] = packed.ljust(entries_size, b"\0")
        else:
            for entry in entries:
                content[entry.code : entry.end] = bytes(entry.end - entry.code)
        start = content.find(_START, end)
    if dropped and not kept:
        raise ValueError(f"expected machine code of sm_{architecture}, found only {dropped} bytes of others")
    return kept, dropped


def _entries(content: bytearray, start: int, end: int) -> Iterator[_Entry]:
    if end > len(content):
        raise ValueError(f"the GPU code at byte {start} ends at {end}, past the file's {len(content)} bytes")
    while start < end:
        kind, _, header_size, code_size = _ENTRY.unpack_from(content, start)
        (architecture,) = _ARCHITECTURE.unpack_from(content, start + _ARCHITECTURE_OFFSET)
        entry = _Entry(kind, architecture, start, start + header_size, start + header_size + code_size)
        if header_size < _ARCHITECTURE_OFFSET + _ARCHITECTURE.size or entry.end > end:
            raise ValueError(f"expected an entry that ends by byte {end}, got one from {start} to {entry.end}")
        yield entry
        start = entry.end
