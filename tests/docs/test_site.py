"""Tests that the documentation builds without a warning, and that it is complete."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))),
        reason="the extra docs is not installed",
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    # Material warns in this variable's absence that there will be a second version of MkDocs.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_public_name_has_an_anchor(site):
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        names = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)
        # A directive that lists no members shows the docstring of a module.
        names = [name for name in names if name != f"jaxkd.{page.stem}"]
        if names:
            html = (site / "api" / page.stem / "index.html").read_text(encoding="utf-8")
            assert not [name for name in names if f'id="{name}"' not in html]


def test_figures_are_part_of_the_site(site):
    recorded = {path.name for path in (ROOT / "experiments" / "results").glob("*.png")}
    assert recorded == {path.name for path in (site / "figures").iterdir()}


def test_code_of_the_hooks_is_not_part_of_the_site(site):
    assert not list(site.rglob("*.py"))


def test_nothing_is_fetched_from_another_host(site):
    """Links may lead elsewhere; scripts, styles, fonts and images may not."""
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img)[^>]+src="(?:https?:)?//[^"]*"', html)
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="https?:', html)
        assert not re.findall(r'<link[^>]+href="https?:[^>]+rel="(?:stylesheet|preconnect)"', html)
