"""The picture of the package's folders is the one that its imports give."""

from __future__ import annotations

import importlib.util
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from tests.docs import pages

SCRIPT = pages.DOCS / "draw_architecture.py"

pytestmark = pytest.mark.skipif(
    not SCRIPT.is_file(), reason="a source distribution has no documentation"
)


@pytest.fixture(scope="module")
def drawing():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("draw_architecture", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def shown(svg: str) -> tuple[set[str], set[str]]:
    """The folders and the arrows of a picture; numbers of modules, lines and imports are not."""
    return set(re.findall(r'data-folder="([^"]+)"', svg)), set(
        re.findall(r"<title>(\S.*? imports [^ <]+(?: modules)?)", svg)
    )


def test_the_committed_picture_is_current(drawing):
    """After a change of folders or of imports between them, draw it again."""
    drawn = drawing.draw(*drawing.read())
    assert shown(drawing.PICTURE.read_text(encoding="utf-8")) == shown(drawn), (
        "run python docs/draw_architecture.py"
    )


def test_it_is_whole(drawing):
    """The picture is XML, and shows every folder of the package and arrows between them."""
    svg = drawing.draw(*drawing.read())
    ElementTree.fromstring(svg)
    folders, arrows = shown(svg)
    package = pages.ROOT / "cudagraph_jax"
    assert {path.parent.name for path in package.glob("*/__init__.py")} <= folders
    assert "dispatch imports capture" in arrows
    assert "dispatch imports root modules" in arrows
    assert not any(arrow.startswith("xla imports dispatch") for arrow in arrows)


def test_the_page_names_every_folder():
    """The table of rungs has every folder of the package."""
    text = (pages.DOCS / "architecture.md").read_text(encoding="utf-8")
    for path in (pages.ROOT / "cudagraph_jax").glob("*/__init__.py"):
        assert f"`{path.parent.name}`" in text


def test_contributors_are_shown_what_is_there():
    """CONTRIBUTING.md has every folder, in its rungs and in its table, and names no file of old."""
    text = (pages.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = pages.ROOT / "cudagraph_jax"
    rungs = ["cli", *re.findall(r"\w+", text.partition("```\ncli ")[2].partition("```")[0])]
    for folder in (path.parent.name for path in package.glob("*/__init__.py")):
        assert folder in rungs
        assert f"| `{folder}/` |" in text
    named = re.findall(r"`([a-z_/]+\.py)`", text)
    assert named
    assert not [
        name for name in named if not (package / name).exists() and not (pages.ROOT / name).exists()
    ]
