"""Values on the command line: read, or refused in words that argparse can show."""

from __future__ import annotations

import argparse
import math
import re
from typing import TYPE_CHECKING

from cudagraph_jax.planning.planner import Headroom

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,9})?"
_POWERS = ("", "K", "M", "G", "T")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not _is_whole(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def named_size(text: str) -> tuple[str, int]:
    """An axis and its size: `height=224`."""
    name, _, size = text.partition("=")
    if not name.isidentifier() or not _is_whole(size) or int(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of an axis, such as height=224")
    return name, int(size)


def seconds(text: str) -> float:
    """A time of 0 or more."""
    number = decimal(text)
    if number is None or not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, such as 30 or 0.5")
    return number


def part(text: str) -> float:
    """A number between 0 and 1, both left out."""
    number = decimal(text)
    if number is None or not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no part between 0 and 1, such as 0.5")
    return number


def headroom(text: str) -> Headroom:
    """A seq_len, a batch and a seq_len (`16x256`), an axis (`src=8`), or a fraction (`0.25`)."""
    if "=" in text:
        return dict([named_size(text)])
    batch, by, seq = text.partition("x")
    if by and _is_whole(batch) and _is_whole(seq):
        return int(batch), int(seq)
    if _is_whole(text):
        return int(text)
    number = decimal(text) if re.fullmatch(r"[0-9]*\.[0-9]+", text) else None
    if number is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no seq_len (14050), no batch and seq_len (16x256), no size of an axis "
            "(src=512) and no fraction (0.25)"
        )
    return number


def axis_column(text: str) -> tuple[str, str]:
    """An axis and the column of its sizes: `src=PromptTokens`."""
    axis, _, column = text.partition("=")
    if not axis or not column:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=COLUMN, such as src=PromptTokens")
    return axis, column


def axis_multiple(text: str) -> tuple[str, int]:
    """An axis and a whole number of 1 or more: `src=8`."""
    axis, _, multiple = text.partition("=")
    if not axis or not _is_whole(multiple) or int(multiple) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=N, such as src=8")
    return axis, int(multiple)


def byte_count(text: str) -> int:
    """A number of bytes: `1000`, `512MiB`, or `1.5G` for the same as `1.5GiB`."""
    found = re.fullmatch(rf"({_NUMBER}) ?([KMGT]?)(I?B)?", text.upper())
    # GB means one thing to a disk and another to a memory: it is not guessed.
    if found is None or (found[2] and found[3] == "B") or (not found[2] and found[3] == "IB"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of bytes, such as 1000000, 512MiB or 20GiB"
        )
    return int(float(found[1]) * 1024 ** _POWERS.index(found[2]))


def age_s(text: str) -> float:
    """An age in seconds: `30d`, `12h`, `90m`, `3600s`, or `3600` alone."""
    found = re.fullmatch(rf"({_NUMBER}) ?([smhdw]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age, such as 30d, 12h, 90m or 3600")
    return float(found[1]) * _SECONDS[found[2]]


def bucket(text: str) -> str:
    """A bucket as it is printed everywhere: `8x128`, or `8x1,height=224`."""
    if re.fullmatch(r"[0-9]{1,15}x[0-9]{1,15}(,[a-zA-Z_]\w*=[0-9]{1,15})*", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no bucket, such as 8x128")
    return text


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
