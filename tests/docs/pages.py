"""Pages of the documentation, and their code run as it stands there."""

from __future__ import annotations

import ast
import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

from cudagraph_jax import BucketedFunction
from tests.helpers.examples import IS_THOROUGH

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [
    README,
    *sorted(path for path in DOCS.rglob("*.md") if not {"_build", "notebooks"} & {*path.parts}),
]

# A page that goes on from another one says so in a sentence, and here to the tests.
AFTER = re.compile(r"<!-- after: (\S+) -->")
FENCED = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# A comment behind a print that says what is printed, not why.
PRINTED = re.compile(r"print\(.*\)  # ([(\[\d'].*|True|False)$")
ALWAYS_THERE = {"cudagraph_jax", "jax", "numpy", *sys.stdlib_module_names}

Names = dict[str, Any]


class Block(NamedTuple):
    """Python on a page, and the line of the page above it."""

    code: str
    line: int


def name_of(page: Path) -> str:
    """How a page is called in tests: its path from the root."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The page's Python, in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(found[1], text.count("\n", 0, found.start(1))) for found in FENCED.finditer(text)]


@contextlib.contextmanager
def few_examples() -> Iterator[None]:
    """Assertions of the kit draw few sizes: they compile each operation of a function for each."""
    usual = settings.get_current_profile_name()
    settings.register_profile("few", settings(), max_examples=10 if IS_THOROUGH else 4)
    settings.load_profile("few")
    try:
        yield
    finally:
        settings.load_profile(usual)


def run(page: Path) -> Names:
    """The names after all blocks of a page, and of those that it goes on from, ran in order.

    Skips the test where a library that a block imports is absent.
    """
    before = AFTER.search(page.read_text(encoding="utf-8"))
    names: Names = run(page.parent / before[1]) if before else {}
    for block in blocks(page):
        _run_block(page, block, names)
    for value in [*names.values()]:
        if isinstance(value, BucketedFunction):
            value.manager.wait()
    return names


def _run_block(page: Path, block: Block, names: Names) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    code = compile("\n" * block.line + block.code, str(page), "exec")
    for name in _imported(block.code):
        pytest.importorskip(name, exc_type=ImportError)

    def checked_print(*values: object, **options: Any) -> None:
        """Prints, and compares with the comment behind the call, where there is one."""
        said = PRINTED.search(lines[sys._getframe(1).f_lineno - 1])
        text = " ".join(map(str, values))
        assert said is None or text == said[1], f"{text} is printed, not {said[1]}"
        print(*values, **options)

    names["print"] = checked_print
    exec(code, names)


def _imported(code: str) -> list[str]:
    """The libraries, and the parts of this package, that a block needs."""
    found: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return [name for name in found if name not in ALWAYS_THERE]
