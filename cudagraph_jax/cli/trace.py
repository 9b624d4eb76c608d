"""Request sizes out of a trace: CSV with a header line, or one JSON object per line."""

from __future__ import annotations

import csv
import io
import json
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from cudagraph_jax._base.checks import nearest
from cudagraph_jax.cli.options import decimal
from cudagraph_jax.errors import ConfigError

STDIN = "-"
JSON_LINES = (".jsonl", ".ndjson")
LARGEST_SIZE = 10_000_000
"""No sequence is longer; a column of times or of identifiers is told by it."""
# Cells beyond csv's own limit of 128 KiB are prompts, which a trace may well hold.
_CELL_LIMIT = 2**31 - 1
_MANY_DIGITS = 100

Row = tuple[int, Sequence[object]]
Rows = Iterator[Row]


class Columns(NamedTuple):
    """Which columns hold the sizes.

    Attributes:
        length: The sequence lengths.
        batch: The batch sizes; None where there are none.
    """

    length: str
    batch: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are read, in the order of a size: (batch, seq_len)."""
        return (self.length,) if self.batch is None else (self.batch, self.length)


def read_sizes(
    source: str, columns: Columns, *, stdin: BinaryIO | None = None
) -> npt.NDArray[np.int64]:
    """The sizes of all requests, in the order of the trace.

    Args:
        source: A file whose suffix is .csv, .jsonl or .ndjson; `-` for CSV on standard input.
        columns: Where the sizes stand.
        stdin: What `-` reads; the process's own standard input if None.

    Returns:
        int64, lengths (N,), or (batch, seq_len) pairs (N, 2) with a batch column.

    Raises:
        ConfigError: The file cannot be read, is no such table, lacks a column, or holds what is no
            size, with the number of the line.
    """
    name = "the standard input" if source == STDIN else source
    suffix = Path(source).suffix.lower()
    if source != STDIN and suffix not in (".csv", *JSON_LINES):
        raise ConfigError(
            f"{source} is no .csv, .jsonl or .ndjson file: name one of those, or {STDIN} for CSV "
            "on the standard input"
        )
    rows = _json_rows if suffix in JSON_LINES else _csv_rows
    try:
        with _opened(source, stdin) as lines:
            found = _sizes(rows(lines, columns.names), columns.names)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            f"{name} cannot be read: {reason}; name a file that is there and that you may read"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 ({error.reason}): convert it first") from error
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    if not found:
        raise ConfigError(f"{name} holds no rows: expected one for each request")
    sizes = np.array(found, np.int64)
    return sizes if columns.batch is None else sizes.reshape(-1, 2)


def _sizes(rows: Rows, names: Sequence[str]) -> array[int]:
    """The sizes of all rows, one after the other."""
    found = array("q")
    for line, cells in rows:
        for cell, name in zip(cells, names, strict=True):
            found.append(_size(cell, name, line))
    return found


@contextmanager
def _opened(source: str, stdin: BinaryIO | None) -> Iterator[TextIO]:
    # utf-8-sig: a byte-order mark is no part of the first column's name.
    if source != STDIN:
        with open(source, encoding="utf-8-sig", newline="") as lines:
            yield lines
        return
    wrapped = io.TextIOWrapper(
        sys.stdin.buffer if stdin is None else stdin, encoding="utf-8-sig", newline=""
    )
    try:
        yield wrapped
    finally:
        # Whoever opened it closes it.
        wrapped.detach()


def _csv_rows(lines: Iterable[str], names: Sequence[str]) -> Rows:
    """The wanted cells of each row, with the line that it starts on."""
    reader = csv.reader(lines, strict=True)
    before = csv.field_size_limit(_CELL_LIMIT)
    line = 1
    try:
        header = [cell.strip() for cell in next(filter(None, reader), [])]
        places = [_place(name, header) for name in names]
        line = reader.line_num + 1
        for row in reader:
            if len(row) == len(header):
                yield line, [row[place] for place in places]
            elif row:
                raise ConfigError(
                    f"line {line} has {len(row)} cells, but the header has {len(header)}"
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"line {line} is no CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _place(name: str, header: Sequence[str]) -> int:
    if not header:
        raise ConfigError("the file is empty: expected a header line and a row for each request")
    if name not in header:
        _refuse_other_separators(header)
        raise ConfigError(f"there is no column {name!r}: {nearest(name, header)}")
    if header.count(name) > 1:
        raise ConfigError(f"the header has {name!r} more than once: give the columns other names")
    return header.index(name)


def _refuse_other_separators(header: Sequence[str]) -> None:
    for separator, words in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            raise ConfigError(f"its columns are separated by {words}: separate them by commas")


def _json_rows(lines: Iterable[str], names: Sequence[str]) -> Rows:
    """The wanted values of each line's object."""
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text.strip(), parse_int=_read_integer)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"line {line} is no JSON: {error.msg}, at column {error.colno}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"line {line} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(
                f"line {line} is no JSON object: expected one for each request, "
                f'such as {{"{names[-1]}": 374}}'
            )
        for name in names:
            if name not in row:
                raise ConfigError(f"line {line} has no {name!r}: {nearest(name, list(row))}")
        yield line, [row[name] for name in names]


def _read_integer(digits: str) -> int | float:
    # int() refuses thousands of digits; how large such a number is says float() too.
    return int(digits) if len(digits) < _MANY_DIGITS else float(digits)


def _size(cell: object, column: str, line: int) -> int:
    number = _number(cell)
    if number is not None and number > LARGEST_SIZE:
        raise ConfigError(
            f"line {line}: {column}={cell!r:.40} is above {LARGEST_SIZE:,}: is this the column of "
            "the sizes?"
        )
    if number is not None and number >= 1 and number == int(number):
        return int(number)
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise ConfigError(f"line {line}: {column} is blank: leave the row out")
    raise ConfigError(f"line {line}: {column}={cell!r:.40} is no whole number of 1 or more")


def _number(cell: object) -> int | float | None:
    """The cell as a number, such as 374, "374" or 374.0; None where it is none."""
    if isinstance(cell, str):
        return decimal(cell.strip())
    return cell if isinstance(cell, int | float) and not isinstance(cell, bool) else None
