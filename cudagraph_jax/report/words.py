"""Numbers in words that fit a cell."""

from __future__ import annotations

from collections.abc import Iterable

_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def exact(number: int) -> str:
    """All digits, in groups of three."""
    return f"{number:,}"


def short(number: int) -> str:
    """At most five characters: three digits and a unit from 10,000 up."""
    if number < 10_000:
        return exact(number)
    # What would be rounded up to 1000 of one unit is 1 of the next.
    size, unit = next(pair for pair in _UNITS if number >= 0.9995 * pair[0])
    value = number / size
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{unit}"


def part(share: float) -> str:
    """A part of a whole, as a percentage; only all is 100.0% and only nothing 0.0%."""
    if 0.9995 <= share < 1:
        return ">99.9%"
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{share:.1%}"


def things(number: int, singular: str, plural: str = "") -> str:
    """A number and what it counts: `"1 bucket"`, `"2 buckets"`."""
    return f"{exact(number)} {singular if number == 1 else plural or singular + 's'}"


def seconds(value: float) -> str:
    """A time in seconds, with what digits matter."""
    return f"{value:,.1f} s" if value >= 10 else f"{value:.2f} s"


def milliseconds(value: float) -> str:
    """A time in milliseconds: in seconds from 1 s up, else with three digits."""
    if value >= 999.5:
        return seconds(value / 1e3)
    digits = 0 if value >= 99.5 else 1 if value >= 9.95 else 2
    return f"{value:.{digits}f} ms"


def listed(pairs: Iterable[tuple[str, int]]) -> str:
    """Counts by name in one line: `"miss 3, overflow 1"`."""
    return ", ".join(f"{name} {exact(number)}" for name, number in pairs)
