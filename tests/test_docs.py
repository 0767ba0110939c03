"""The site of docs/: it builds strictly, loads nothing from elsewhere, and its pictures are up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT

from benchmarks import pictures
from fastafd.cli import entries
from fastafd.recipes import RECIPES, released

PAGES = sorted(path for path in (ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, in a folder of its own."""
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Loaded(HTMLParser):
    """The addresses that a browser loads when it shows the page, and the pictures without a text."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.silent = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video", "audio"):
            self.addresses.append(values.get("src") or "")
        if tag == "link" and values.get("rel") != "canonical":
            self.addresses.append(values.get("href") or "")
        if tag == "img" and not values.get("alt"):
            self.silent.append(values.get("src"))


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) == len(PAGES) + 1  # and the page for a wrong address
    for page in pages:
        loaded = Loaded(page.read_text())
        assert not [address for address in loaded.addresses if re.match(r"(https?:)?//", address)], page
        assert not loaded.silent, page
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\(\s*['\"]?(?:https?:)?//|@import", style.read_text()), style


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert named == {path.name for path in PAGES}


def test_settings_and_recipes_are_generated(site):
    page = (site / "recipes" / "index.html").read_text()
    for name in RECIPES:
        assert f"<code>{name}</code>" in page
    for name, _, field in entries(released()):
        assert f"<code>--{name.replace('_', '-')}</code>" in page and field.metadata["help"].split(";")[0][:20] in page
    assert "<!--" not in page.split("<article")[1].split("</article")[0]


def test_the_public_names_are_in_the_api(site):
    import fastafd

    page = (site / "api" / "index.html").read_text()
    for name in fastafd.__all__:
        assert f"fastafd.{name}" in page, name


def test_results_that_pages_link_to_are_in_the_site(site):
    linked = re.findall(r'href="(?:\.\./)*(results/[^"]+\.json)"', (site / "methods" / "index.html").read_text())
    assert linked and all((site / name).exists() for name in linked)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_those_of_the_command(name):
    assert (ROOT / "docs" / "figures" / f"{name}.svg").read_text() == pictures.PICTURES[name]()
