"""Values on the command line: read, or refused in words that argparse can show."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from cudagraph_jax.shapes.planner import Headroom

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not _is_whole(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def part(text: str) -> float:
    """A number between 0 and 1, both left out."""
    number = decimal(text)
    if number is None or not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no part between 0 and 1, such as 0.5")
    return number


def headroom(text: str) -> Headroom:
    """A seq_len (`14050`), a batch and a seq_len (`16x256`), or a fraction with a dot (`0.25`)."""
    batch, by, seq = text.partition("x")
    if by and _is_whole(batch) and _is_whole(seq):
        return int(batch), int(seq)
    if _is_whole(text):
        return int(text)
    number = decimal(text)
    if number is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no seq_len (14050), no batch and seq_len (16x256) and no fraction (0.25)"
        )
    return number


def decimal(text: str) -> float | None:
    """The number that a trace or a command line holds, `1e3` and `2.0` included; None if none.

    `float` alone would also read `1_000`, `nan` and the digits of other scripts.
    """
    try:
        return float(text) if re.fullmatch(r"[-+.eE0-9]+", text) else None
    except ValueError:
        return None


def _is_whole(text: str) -> bool:
    # More digits than any size has would also be more than int() reads.
    return re.fullmatch(r"[0-9]{1,15}", text) is not None
