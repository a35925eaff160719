"""The pack for a GPU machine: GPU code of other architectures goes, the plugin's entry point is found."""

from __future__ import annotations

import struct
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

from tools.gpu.fatbin import keep_architecture
from tools.gpu.pack import REQUIREMENTS, is_needed, plugin_metadata

PTX, MACHINE_CODE = 1, 2


def entry(kind: int, architecture: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(code)).ljust(28, b"h") + struct.pack("<I", architecture)
    return header.ljust(64, b"h") + code


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_a_container_becomes_as_if_compiled_for_the_architecture_alone() -> None:
    mine, also_mine = entry(MACHINE_CODE, 90, b"m" * 32), entry(MACHINE_CODE, 90, b"a" * 8)
    others = entry(MACHINE_CODE, 80, b"o" * 16), entry(PTX, 90, b"p" * 8)
    rest = sum(map(len, others))
    code = bytearray(b"before" + container(*others, mine, also_mine) + b"between" + container(also_mine) + b"after")
    expected = b"before" + container(mine, also_mine) + bytes(rest) + b"between" + container(also_mine) + b"after"
    assert keep_architecture(code, 90) == (len(mine) + 2 * len(also_mine), rest)
    assert code == expected


def test_a_container_without_the_architecture_keeps_the_smallest_code_that_does_not_fit() -> None:
    small, large, ptx = entry(MACHINE_CODE, 80, b"s" * 8), entry(MACHINE_CODE, 120, b"l" * 16), entry(PTX, 80, b"p" * 8)
    code = bytearray(container(ptx, large, small))
    assert keep_architecture(code, 90) == (len(small), len(large + ptx))
    assert code == container(small) + bytes(len(large + ptx))


def test_a_container_of_ptx_alone_stays() -> None:
    whole = container(entry(PTX, 80, b"p" * 24))
    code = bytearray(whole)
    assert keep_architecture(code, 90) == (64 + 24, 0)
    assert code == whole


def test_a_file_without_gpu_code_stays_as_it_is() -> None:
    code = bytearray(b"plain" * 100)
    assert keep_architecture(code, 90) == (0, 0)
    assert code == b"plain" * 100


def test_a_broken_container_is_refused() -> None:
    whole = container(entry(MACHINE_CODE, 90, b"code1234"))
    with pytest.raises(ValueError, match="past the file's"):
        keep_architecture(bytearray(whole[:-1]), 90)
    longer = bytearray(whole)
    struct.pack_into("<Q", longer, 16 + 8, 1000)  # the entry says that it has more code
    with pytest.raises(ValueError, match="expected an entry that ends by"):
        keep_architecture(longer, 90)


def test_the_plugin_is_found_by_its_metadata_alone(tmp_path: Path) -> None:
    for name, content in plugin_metadata():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (found,) = distributions(path=[str(tmp_path)])
    assert found.metadata["Name"] == "vllm-kvevict"
    assert found.version == Distribution.from_name("vllm-kvevict").version
    (plugin,) = found.entry_points.select(group="vllm.general_plugins")
    assert (plugin.name, plugin.value) == ("kvevict", "vllm_kvevict:register")


@pytest.mark.parametrize(
    ("name", "is_kept"),
    [
        ("vllm/v1/worker/gpu_worker.py", True),
        ("vllm/_C_stable_libtorch.abi3.so", True),
        ("vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", False),
        ("vllm-0.32.0.dist-info/METADATA", True),
        ("vllm/third_party/deep_gemm/include/a.cuh", False),
    ],
)
def test_of_vllm_s_wheel_only_what_an_engine_loads_is_packed(name: str, is_kept: bool) -> None:
    assert is_needed(name) is is_kept


def test_every_wheel_has_one_pinned_version() -> None:
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert all(line.count("==") == 1 for line in lines)
    assert len({line.partition("==")[0] for line in lines}) == len(lines)
