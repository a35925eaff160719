"""A release is kept back by name: an unfinished changelog, a version that does not fit, a library that is missing."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools import release
from vllm_kvevict import __version__

VERSION = "1.2.3"
METADATA = f"Metadata-Version: 2.4\nName: vllm-kvevict\nVersion: {VERSION}\n"
FILES = {
    "CITATION.cff": f"title: x\nversion: {VERSION}\n",
    "pyproject.toml": 'dependencies = ["vllm>=0.32,<0.34"]\n',
    "CHANGELOG.md": f"# Changelog\n\n## [{VERSION}] - 2026-01-02\n\nSupported vLLM: >=0.32,<0.34 (run)\n\n## [1.0.0]\n",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    commit(tmp_path)
    return tmp_path


def commit(checkout: Path) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "x", "--allow-empty"]):
        subprocess.run(["git", *words], cwd=checkout, check=True)


def test_a_checkout_that_is_ready_lacks_nothing(checkout: Path) -> None:
    assert release.missing_in(checkout, VERSION) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("CITATION.cff", VERSION, "1.2.4", "CITATION.cff: its version must be 1.2.3"),
        ("CHANGELOG.md", "2026-01-02", "unreleased", "CHANGELOG.md: expected a section `## [1.2.3] - DATE`"),
        ("CHANGELOG.md", f"[{VERSION}]", "[1.2.2]", "CHANGELOG.md: expected a section `## [1.2.3] - DATE`"),
        (
            "CHANGELOG.md",
            "<0.34",
            "<0.33",
            "CHANGELOG.md: the section of 1.2.3 must say `Supported vLLM: >=0.32,<0.34`",
        ),
    ],
)
def test_what_does_not_fit_is_named(checkout: Path, file: str, old: str, new: str, said: str) -> None:
    (checkout / file).write_text(FILES[file].replace(old, new))
    commit(checkout)
    assert release.missing_in(checkout, VERSION)[0].startswith(said)
    with pytest.raises(release.NotReady, match=re.escape(said)):
        release.require(release.missing_in(checkout, VERSION))


def test_changes_that_are_not_committed_are_named(checkout: Path) -> None:
    (checkout / "new.py").write_text("")
    (said,) = release.missing_in(checkout, VERSION)
    assert said.startswith("git status: ")


def test_this_checkout_lacks_a_date_at_most() -> None:
    found = [said for said in release.missing_in(ROOT, __version__) if not said.startswith("git status")]
    assert [said for said in found if "put the day of the release there" not in said] == []


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    pack(tmp_path)
    return tmp_path


def pack(dist: Path, *, version: str = VERSION, left_out: str = "", metadata: str = METADATA) -> None:
    with zipfile.ZipFile(dist / f"vllm_kvevict-{version}-py3-none-{release.MANYLINUX}.whl", "w") as wheel:
        for name in (*release.LIBRARIES, f"vllm_kvevict-{version}.dist-info/METADATA"):
            if name != left_out:
                wheel.writestr(name, metadata)
    with tarfile.open(dist / f"vllm_kvevict-{version}.tar.gz", "w:gz") as sdist:
        information = tarfile.TarInfo(f"vllm_kvevict-{version}/PKG-INFO")
        information.size = len(metadata)
        sdist.addfile(information, io.BytesIO(metadata.encode()))


def test_nothing_is_wrong_with_what_is_whole(dist: Path) -> None:
    assert release.wrong_in(dist, VERSION) == []


def test_another_version_is_named_for_both(dist: Path) -> None:
    wheel, sdist = release.wrong_in(dist, "1.2.4")
    assert "expected a wheel of 1.2.4" in wheel and "expected an sdist of 1.2.4" in sdist


@pytest.mark.parametrize("library", release.LIBRARIES)
def test_a_missing_library_is_named(dist: Path, library: str) -> None:
    pack(dist, left_out=library)
    (said,) = release.wrong_in(dist, VERSION)
    assert f"it lacks {library}" in said


def test_metadata_that_an_index_refuses_are_named(dist: Path) -> None:
    pack(dist, metadata=METADATA + "License-Expression: none of these\n")
    wheel, sdist = release.wrong_in(dist, VERSION)
    assert ".whl: " in wheel and ".tar.gz: " in sdist and "license" in wheel
