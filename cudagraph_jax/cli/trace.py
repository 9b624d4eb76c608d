"""Request sizes out of a trace: CSV with a header line, or one JSON object per line."""

from __future__ import annotations

import csv
import io
import json
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

import numpy as np
import numpy.typing as npt

from cudagraph_jax._base.checks import nearest
from cudagraph_jax.cli.options import decimal
from cudagraph_jax.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Buffer

STDIN = "-"
JSON_LINES = (".jsonl", ".ndjson")
LARGEST_SIZE = 10_000_000
"""No sequence is longer; a column of times or of identifiers is told by it."""
LONGEST_LINE = 2**26
"""In bytes. Lines beyond csv's own limit of 128 KiB hold prompts, as a trace well may; one beyond
this limit may have no end."""
_MANY_DIGITS = 100

_MOST_KNOWN = 100_000

Rows = Iterator[Sequence[int]]


def read_sizes(
    source: str, columns: Sequence[str], *, stdin: BinaryIO | None = None
) -> npt.NDArray[np.int64]:
    """The sizes of all requests, in the order of the trace.

    Args:
        source: A file whose suffix is .csv, .jsonl or .ndjson; `-` for CSV on standard input.
        columns: The names of those that hold the sizes, one for each axis.
        stdin: What `-` reads; the process's own standard input if None.

    Returns:
        int64 (N,) from one column, else (N, columns).

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
            found = array("q", chain.from_iterable(rows(lines, columns)))
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
    sizes = np.frombuffer(found, np.int64)
    return sizes if len(columns) == 1 else sizes.reshape(-1, len(columns))


@contextmanager
def _opened(source: str, stdin: BinaryIO | None) -> Iterator[TextIO]:
    with ExitStack() as stack:
        if source != STDIN:
            file: BinaryIO = stack.enter_context(open(source, "rb"))
        elif stdin is not None:
            file = stdin
        elif sys.stdin is None:
            raise ConfigError("it is closed: send the trace there, or name a file")
        else:
            file = sys.stdin.buffer
        # utf-8-sig: a byte-order mark is no part of the first column's name.
        yield io.TextIOWrapper(
            io.BufferedReader(_Lines(file), _BUFFER_BYTES), encoding="utf-8-sig", newline=""
        )


class _Lines(io.RawIOBase):
    """A file, as long as its lines end somewhere; whoever opened it closes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._open_bytes = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        """Reads some bytes; how many."""
        view = memoryview(buffer)
        data = self._file.read(len(view))
        view[: len(data)] = data
        end = max(data.rfind(b"\n"), data.rfind(b"\r"))
        self._open_bytes = self._open_bytes + len(data) if end < 0 else len(data) - end - 1
        if self._open_bytes > LONGEST_LINE:
            raise ConfigError(f"a line is longer than {LONGEST_LINE:,} bytes: this is no trace")
        return len(data)


_BUFFER_BYTES = 1 << 16


def _csv_rows(lines: Iterable[str], names: Sequence[str]) -> Rows:
    """The sizes in each row."""
    # The same few cells come again and again: with this, ten million rows take half the time.
    known: dict[str, int] = {}

    def learn(cell: str, name: str) -> int:
        size = _size(cell, name, line)
        if len(known) < _MOST_KNOWN:
            known[cell] = size
        return size

    reader = csv.reader(lines, strict=True)
    before = csv.field_size_limit(LONGEST_LINE)
    line = 1
    try:
        header = [cell.strip() for cell in next(filter(None, reader), [])]
        places = [(_place(name, header), name) for name in names]
        line = reader.line_num + 1
        for row in reader:
            if len(row) == len(header):
                yield [known.get(row[place]) or learn(row[place], name) for place, name in places]
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
        if all(decimal(cell) is not None for cell in header):
            raise ConfigError(
                f"its first line, {','.join(header)!r:.40}, holds numbers and no names of columns: "
                f"put a header above it, with {name!r} for the column of the sizes"
            )
        raise ConfigError(f"there is no column {name!r}: {nearest(name, header)}")
    if header.count(name) > 1:
        raise ConfigError(f"the header has {name!r} more than once: give the columns other names")
    return header.index(name)


def _refuse_other_separators(header: Sequence[str]) -> None:
    for separator, words in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            raise ConfigError(f"its columns are separated by {words}: separate them by commas")


def _json_rows(lines: Iterable[str], names: Sequence[str]) -> Rows:
    """The sizes in each line's object."""
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
        yield [_size(row[name], name, line) for name in names]


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
