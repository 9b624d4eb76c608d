"""Text: tables, errors, one line of what may hold anything, and what JSON can hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Row = Sequence[str]

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
"""What JSON can hold."""

_NUMBER = re.compile(r"[-+<>\u2212]?[\d,]*\.?\d+(e[-+]?\d+)?( ?(%|×|ms|s|B|KiB|MiB|GiB|[kMGT]))?|–")


def text_table(header: Row, rows: Sequence[Row]) -> str:
    """Columns as wide as their widest cell, numbers to the right; empty columns are left out."""
    keep = [column for column in range(len(header)) if any(row[column] for row in rows)]
    table = [[one_line(row[column]) for column in keep] for row in (header, *rows)]
    columns = list(zip(*table, strict=True))
    widths = [max(map(len, cells)) for cells in columns]
    right = [is_number_column(cells[1:]) for cells in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in table
    )


def text_pairs(pairs: Sequence[tuple[str, str]]) -> str:
    """A line for each label and value, the values below each other."""
    width = max((len(one_line(label)) for label, _ in pairs), default=0)
    return "\n".join(
        f"{one_line(label).ljust(width)}  {one_line(value)}".rstrip() for label, value in pairs
    )


def one_line(text: str) -> str:
    """The text without what would break a line, or act on a terminal."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )


_TRACEBACK = "Traceback (most recent call last):"


def error_text(error: BaseException) -> str:
    """What an error says, without a traceback within: those of callbacks come as part of the text.

    It never fails, whoever wrote the error's class: some fail when they are asked.
    """
    try:
        text = str(error).strip()
    except Exception as failure:
        return f"(its own text fails with {type(failure).__name__})"
    if _TRACEBACK in text:
        before, _, _ = text.partition(_TRACEBACK)
        _, _, last = text.rpartition(_TRACEBACK)
        told = [line for line in last.splitlines() if line and not line.startswith(" ")]
        text = " ".join([before.strip(), *told]).strip()
    return text or type(error).__name__


def error_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {error_text(error)}".split("\n", 1)[0]


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def is_number_column(cells: Sequence[str]) -> bool:
    """Whether all filled cells are numbers, which stand to the right."""
    filled = [cell for cell in cells if cell]
    return bool(filled) and all(map(_is_number, filled))
