"""Python calls the compiled functions with the arguments that C declares, and no library that was built from others."""

import shutil
import subprocess
from pathlib import Path
from runpy import run_path

import pytest

from vllm_kvevict.kernels.interface import CUDA_SIGNATURES, SIGNATURES, declarations, digest
from vllm_kvevict.kernels.native import library, load

CSRC = Path(__file__).parents[2] / "csrc"
declared_in = run_path(str(CSRC / "declarations.py"))["declarations"]


@pytest.mark.parametrize(("folder", "signatures"), [("cpu", SIGNATURES), ("cuda", CUDA_SIGNATURES)])
def test_every_declaration_is_python_s(folder, signatures):
    assert sorted(declared_in(CSRC / folder)) == sorted(declarations(signatures))


def test_declarations_are_read_as_c_means_them(tmp_path):
    start = 'extern "C" __attribute__((visibility("default"))) int32_t kvevict_some('
    (tmp_path / "some.cpp").write_text(f"{start}\n    const float* a, int64_t b,\n    float c, bool* d) {{\n")
    assert declared_in(tmp_path) == ["kvevict_some(pointer, int64_t, float, pointer)"]
    (tmp_path / "some.cpp").write_text(f"{start}double a) {{")
    with pytest.raises(ValueError, match="got 'double a'"):
        declared_in(tmp_path)


def test_the_digest_is_of_names_and_kinds_in_any_order():
    lines = declarations(SIGNATURES)
    assert digest(reversed(lines)) == digest(lines)
    assert len({digest(lines), digest(lines[1:]), digest([*lines[1:], lines[0].replace("int64_t", "int32_t", 1)])}) == 3


@pytest.mark.skipif(library() is None, reason="the kernels are not built")
def test_the_installed_library_is_not_refused():
    assert load(library()._name, SIGNATURES) is not None


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('const char* kvevict_interface() { return "0123456789abcdef"; }', "got 0123456789abcdef"),
        ("int kvevict_select() { return 0; }", "got no digest"),
    ],
    ids=["other declarations", "older than the digest"],
)
def test_a_library_of_other_declarations_is_refused_by_name(tmp_path, source, found):
    (tmp_path / "stale.cpp").write_text(f'extern "C" {source}\n')
    path = str(tmp_path / "stale.so")
    subprocess.run(["c++", "-shared", "-fPIC", "-o", path, str(tmp_path / "stale.cpp")], check=True)
    with pytest.raises(RuntimeError, match=f"stale.so: expected a library of interface .*, {found}.* Build it again"):
        load(path, SIGNATURES)
