"""The pages as a site: built strictly, with every public name, and nothing fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_public import PUBLIC
from tools.site import PAGES, site_path

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_site_and_in_its_navigation(site: Path) -> None:
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} | {*PAGES.values()}
    assert {str(path.relative_to(site).with_suffix(".md")) for path in site.rglob("*.html")} - {"404.md"} == pages
    text = (ROOT / "mkdocs.yml").read_text()
    assert pages == set(re.findall(r"[\w/-]+\.md\b", text.partition("\nnav:")[2]))
    assert yaml.safe_load(text)["docs_dir"] == "docs"


def test_links_that_leave_a_page_outside_of_docs_lead_on(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert 'href="operations.html#install"' in home and 'href="contributing.html"' in home
    assert 'src="images/eviction.svg"' in home
    assert 'href="example_policy.html"' in (site / "policies.html").read_text()
    assert (site_path("docs/adr/x.md"), site_path("LICENSE")) == ("adr/x.md", None)
    measurements = (site / "measurements" / "index.html").read_text()
    assert 'src="decode.png"' in measurements and (site / "measurements" / "decode.png").is_file()
    assert 'href="measurements/index.html"' in (site / "results.html").read_text()


def test_the_page_of_python_names_has_all_that_are_public(site: Path) -> None:
    page = (site / "api.html").read_text()
    names = {name for of_module in PUBLIC.values() for name in of_module} - {"__version__", "AUTO"}
    assert {name for name in names if name not in page} == set()
    run_together = re.findall(r"<p>[a-z_]+: [^<]*\n[a-z_]+: ", page)  # names of a docstring that are no list
    assert "<li><code>kv_len</code>: tokens in the cache" in page and not run_together


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"\']?(?:https?:)?//[^>]*>", path.read_text())
        assert not [tag for tag in fetched if "rel=canonical" not in tag], path
