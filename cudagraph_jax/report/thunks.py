"""XLA's thunk sequences: the steps of a GPU program, and which of them a command buffer records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# "<indent><id>: kKernel  <tab>details"; what is nested is indented further, under headings such
# as "condition:" (XLA, `ThunkSequence::ToString`).
_THUNK = re.compile(r"(?P<indent> *)\d+: (?P<kind>k[A-Z]\w*)")
_COMMAND_BUFFER = "kCommandBuffer"
_SEQUENCE = "kSequential"


class Thunk(NamedTuple):
    """One step of a GPU program.

    Attributes:
        kind: What it does, as XLA calls it, such as `"kGemm"`.
        is_recorded: Whether a command buffer records it.
    """

    kind: str
    is_recorded: bool


class ThunkSequence(NamedTuple):
    """What a dump of XLA shows of one program.

    Attributes:
        command_buffers: How many command buffers it has.
        thunks: Its steps, those inside of loops and branches too, command buffers left out.
    """

    command_buffers: int
    thunks: tuple[Thunk, ...]


def parse_thunks(text: str) -> ThunkSequence:
    """The steps that a `thunk_sequence*.txt` of XLA's dump shows."""
    command_buffers = 0
    thunks: list[Thunk] = []
    around: list[tuple[int, str]] = []
    for indent, kind in _lines(text.splitlines()):
        while around and around[-1][0] >= indent:
            around.pop()
        if kind == _COMMAND_BUFFER:
            command_buffers += 1
        elif kind != _SEQUENCE:
            thunks.append(Thunk(kind, any(outer == _COMMAND_BUFFER for _, outer in around)))
        around.append((indent, kind))
    return ThunkSequence(command_buffers, tuple(thunks))


def _lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    for line in lines:
        found = _THUNK.match(line)
        if found is not None:
            yield len(found["indent"]), found["kind"]
