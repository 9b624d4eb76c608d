"""XLA's thunk sequences: the steps of a GPU program, and which of them a command buffer records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# "<indent><id>: kKernel  <tab>details"; what is nested is indented further, under headings such
# as "condition:" (XLA, `ThunkSequence::ToString`).
_THUNK = re.compile(r"(?P<indent> *)\d+: (?P<kind>k[A-Z]\w*)")
_COMMAND_BUFFER = "kCommandBuffer"
# They only hold or join others, and XLA does not count them either (`CountCommandBufferSize`).
_UNCOUNTED = frozenset({"kAsyncDone", "kAsyncStart", "kGroup", "kSequential"})


class Thunk(NamedTuple):
    """One step of a GPU program.

    Attributes:
        kind: What it does, as XLA calls it, such as `"kGemm"`.
        is_recorded: Whether a command buffer records it.
        inside: The kinds of those that it is a part of, such as a loop, from the outermost in.
    """

    kind: str
    is_recorded: bool
    inside: tuple[str, ...] = ()


class ThunkSequence(NamedTuple):
    """What a dump of XLA shows of one program.

    Attributes:
        command_buffers: How many command buffers it has.
        thunks: Its steps, those inside of loops and branches too. What only holds or joins others
            is left out: command buffers, sequences, and both ends of what runs asynchronously.
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
        elif kind not in _UNCOUNTED:
            outer = [kind for _, kind in around]
            parts = tuple(kind for kind in outer if kind != _COMMAND_BUFFER)
            thunks.append(Thunk(kind, _COMMAND_BUFFER in outer, parts))
        around.append((indent, kind))
    return ThunkSequence(command_buffers, tuple(thunks))


def _lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    for line in lines:
        found = _THUNK.match(line)
        if found is not None:
            yield len(found["indent"]), found["kind"]
