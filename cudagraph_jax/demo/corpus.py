"""The text that the demo searches: the paragraphs of NumPy's docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MODULES = (
    "numpy",
    "numpy.linalg",
    "numpy.fft",
    "numpy.random",
    "numpy.polynomial",
    "numpy.strings",
    "numpy.exceptions",
    "numpy.testing",
    "numpy.ma",
)
MIN_WORDS = 3
# numpydoc sections that hold code, names or book titles rather than prose.
SKIPPED_SECTIONS = frozenset({"Examples", "See Also", "See also", "References", "Methods"})

_HEADING = re.compile(r"\s*(?P<title>\S[^\n]*)\n\s*[-=]{3,}\s*(\n|$)")
_NOT_PROSE = re.compile(r">>>|\.\. |:\w+:|[|+=]|\S+\([^)]*\)( ->.*)?$")
_WORD = re.compile(r"\S*[A-Za-z]{2,}\S*")


@dataclass(frozen=True, slots=True)
class Passage:
    """One paragraph, on one line, and the name of what it documents."""

    name: str
    text: str


def numpy_passages(*, limit: int | None = None) -> list[Passage]:
    """The paragraphs of the docstrings of NumPy's public functions and classes.

    The first paragraphs of all names come before all second ones, so that a limit
    keeps the summaries. The order depends on the NumPy version alone.

    Args:
        limit: At most this many passages; None for all.
    """
    return passages(public_docstrings(MODULES), limit=limit)


def passages(docstrings: Iterable[tuple[str, str]], *, limit: int | None = None) -> list[Passage]:
    """The paragraphs of prose in docstrings, each text once, under its first name.

    Args:
        docstrings: Pairs of a qualified name and its docstring.
        limit: At most this many passages; None for all.
    """
    ranked = [
        (rank, Passage(name, text))
        for name, docstring in docstrings
        for rank, text in enumerate(paragraphs(docstring))
    ]
    unique: dict[str, Passage] = {}
    for _, passage in sorted(ranked, key=lambda pair: pair[0]):
        unique.setdefault(passage.text, passage)
    return list(unique.values())[:limit]


def paragraphs(docstring: str) -> Iterator[str]:
    """The paragraphs of prose: no headings, signatures, doctests, directives or tables.

    Args:
        docstring: A docstring, indented or not.
    """
    section = ""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        heading = _HEADING.match(block)
        if heading:
            section = heading["title"].strip()
        body = block[heading.end() :] if heading else block
        text = " ".join(body.split())
        if section not in SKIPPED_SECTIONS and _is_prose(text):
            yield text


def public_docstrings(modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The qualified name and the docstring of each public function and class.

    Args:
        modules: Names of modules to import.
    """
    for module_name in modules:
        module = importlib.import_module(module_name)
        for name in sorted(set(module.__all__)):
            member = getattr(module, name, None)
            docstring = getattr(member, "__doc__", None)
            if callable(member) and isinstance(docstring, str):
                yield f"{module_name}.{name}", docstring


def _is_prose(text: str) -> bool:
    return len(_WORD.findall(text)) >= MIN_WORDS and not _NOT_PROSE.match(text)
