"""What the README and the pages of the site say is so: code, commands, names and links."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import pytest

import cudagraph_jax
from cudagraph_jax import cli
from tests.docs import pages

ROOT = pages.ROOT
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)")
HEADING = re.compile(r"^#+ (.+)$", flags=re.MULTILINE)
LINK_TO_HEADING = re.compile(r"\]\(([^)#\s]*)#([\w-]+)\)")
FENCE = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)
TEST = re.compile(r"`(test_\w+)\.py::(test_\w+)`|`::(test_\w+)`")

pytestmark = pytest.mark.skipif(
    not (ROOT / "docs").is_dir(), reason="a source distribution has no documentation"
)
each_page = pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
# The README's code runs in test_readme.py, that of recipes in test_recipes.py.
WITH_CODE = [
    page for page in pages.PAGES[1:] if pages.blocks(page) and page.parent.name != "recipes"
]


@pytest.mark.parametrize("page", WITH_CODE, ids=pages.name_of)
def test_code(page, tmp_path, monkeypatch):
    """Every Python block of a page runs, in order, as its comments say; its own tests pass."""
    monkeypatch.chdir(tmp_path)
    with pages.few_examples():
        names = pages.run(page)
        for test in [names[name] for name in names if name.startswith("test_")]:
            test()
    if page.name == "observing.md":
        report = (tmp_path / "cache.html").read_text(encoding="utf-8")
        assert report.lower().startswith("<!doctype")


@each_page
def test_code_can_be_typed(page):
    """What is indented ends with an empty line, as Python's prompt up to 3.12 wants it."""
    for block in pages.blocks(page):
        lines = [*block.code.splitlines(), ""]
        for statement in ast.parse(block.code).body:
            end = statement.end_lineno or 0
            assert not hasattr(statement, "body") or not lines[end], lines[end]


@each_page
def test_links(page):
    """Whatever a page links to in the repository is there."""
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@each_page
def test_links_to_headings(page):
    """A link into a page leads to a heading of it."""
    for target, anchor in LINK_TO_HEADING.findall(page.read_text(encoding="utf-8")):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        assert anchor in map(slug, HEADING.findall(FENCE.sub("", text))), (target, anchor)


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each_page
def test_commands(page):
    """Commands, make targets and scripts that a page tells to run are there."""
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for name in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, flags=re.MULTILINE):
        assert name in targets
    known = re.findall(r"[a-z]+", cli._parser().format_usage() + cli._parser().format_help())
    for name in re.findall(r"(?:^|`)cudagraph-jax ([a-z]+)", text, flags=re.MULTILINE):
        assert name in known
    for script in re.findall(r"python (\w+/\w+\.py)", text):
        assert (ROOT / script).is_file(), script


@each_page
def test_errors(page):
    """Errors and warnings that a page names are the package's or Python's."""
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"`(\w+(?:Error|Warning))`", text)):
        assert hasattr(cudagraph_jax, name) or hasattr(builtins, name), name


def test_cited_tests():
    """Every test that the page of faults cites is there, in the file that it names."""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    file = ""
    cited = TEST.findall(text)
    assert len(cited) > 20
    for name, first, further in cited:
        file = name or file
        texts = [path.read_text("utf-8") for path in (ROOT / "tests").rglob(f"{file}.py")]
        wanted = f"def {first or further}("
        assert any(wanted in text for text in texts), (file, wanted)


def test_every_page_is_in_a_contents():
    """Every page is reached from a list of contents, as Sphinx asks for, and once."""
    listed: list[Path] = []
    for page in pages.PAGES[1:]:
        for tree in re.findall(r"```{toctree}\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            names = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed += [page.parent / f"{name}.md" for name in names]
    written = [path for path in listed if "notebooks" not in path.parts]
    assert sorted([*written, ROOT / "docs" / "index.md"]) == sorted(pages.PAGES[1:])


def test_every_public_name_is_documented():
    """The reference has every name of the package, its testing kit, its metrics and its server."""
    from cudagraph_jax import prometheus, server, testing

    text = "".join(path.read_text("utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"auto(?:class|function|exception|data):: ([\w.]+)", text))
    for module in (cudagraph_jax, testing, prometheus, server):
        for name in module.__all__:
            if name != "__version__":
                assert f"{module.__name__}.{name}" in shown
