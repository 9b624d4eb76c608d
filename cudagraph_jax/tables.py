"""Tables as text and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Row = Sequence[str]


def text_table(header: Row, rows: Sequence[Row]) -> str:
    """Columns as wide as their widest cell; empty columns are left out."""
    keep = [column for column in range(len(header)) if any(row[column] for row in rows)]
    table = [[row[column] for column in keep] for row in (header, *rows)]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def html_table(title: str, header: Row, rows: Sequence[Row]) -> str:
    """The same as an HTML table with a caption; every cell is escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f"<table><caption>{escape(title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
