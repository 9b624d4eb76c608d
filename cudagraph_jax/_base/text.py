"""Tables as text and as HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from cudagraph_jax._base.html import styled

Row = Sequence[str]

_NUMBER = re.compile(r"[-+<>\u2212]?[\d,]*\.?\d+(e[-+]?\d+)?( ?(%|×|ms|s|B|KiB|MiB|GiB|[kMGT]))?|–")
_LONG = 32


def text_table(header: Row, rows: Sequence[Row]) -> str:
    """Columns as wide as their widest cell, numbers to the right; empty columns are left out."""
    keep = [column for column in range(len(header)) if any(row[column] for row in rows)]
    table = [[one_line(row[column]) for column in keep] for row in (header, *rows)]
    columns = list(zip(*table, strict=True))
    widths = [max(map(len, cells)) for cells in columns]
    right = [_is_number_column(cells[1:]) for cells in columns]
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


def escaped(text: str) -> str:
    """The text as HTML shows it, without what would act on a terminal or turn it around."""
    return escape("\n".join(map(one_line, text.split("\n"))))


def html_table(title: str, header: Row, rows: Sequence[Row]) -> str:
    """The same as an HTML table with a caption and its CSS; every cell is escaped."""
    return styled(table_fragment(title, header, rows))


def html_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    """An HTML table of a label and a value in each row, with its CSS; every cell is escaped."""
    return styled(pairs_fragment(title, pairs))


def table_fragment(title: str, header: Row, rows: Sequence[Row]) -> str:
    """`html_table` as a part of something larger, which holds the CSS."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    right = [_is_number_column(cells) for cells in columns]
    head = "".join(
        f'<th scope="col"{_class(is_right)}>{escaped(cell)}</th>'
        for cell, is_right in zip(header, right, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(_cell(cell, is_right) for cell, is_right in zip(row, right, strict=True))
        + "</tr>"
        for row in rows
    )
    return scrolling(
        title,
        f"<table><caption>{escaped(title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
    )


def pairs_fragment(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    """`html_pairs` as a part of something larger, which holds the CSS."""
    body = "".join(
        f'<tr><th scope="row">{escaped(label)}</th>{_cell(value, False)}</tr>'
        for label, value in pairs
    )
    return scrolling(
        title, f"<table><caption>{escaped(title)}</caption><tbody>{body}</tbody></table>"
    )


def scrolling(title: str, table: str) -> str:
    """A table that scrolls by itself where it is wider than the page, also by the keyboard."""
    label = escaped(title)
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{table}</div>'


def _cell(text: str, is_right: bool) -> str:
    return f"<td{_class(is_right, len(text) > _LONG)}>{escaped(text)}</td>"


def _class(is_right: bool, is_long: bool = False) -> str:
    if is_right:
        return ' class="n"'
    return ' class="w"' if is_long else ""


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _is_number_column(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell]
    return bool(filled) and all(map(_is_number, filled))
