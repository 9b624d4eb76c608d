"""What identifies an executable: its one text, the name of its file, and where two differ."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from cudagraph_jax._base.text import Json
from cudagraph_jax.errors import ConfigError

Identity: TypeAlias = Mapping[str, Json]
"""Fields that must all be equal for an executable to be loaded; without mappings inside."""

SUFFIX = ".graph"

_DEPTH = 32
_SHOWN = 60
_MOST = 4


class Plain(dict[str, Any]):
    """What `plain` gives: it is not looked through again."""


class Difference(NamedTuple):
    """A field in which two identities differ.

    Attributes:
        field: Its name.
        stored: The stored value as JSON; None if the field is missing.
        wanted: The value asked for, likewise.
    """

    field: str
    stored: str | None
    wanted: str | None

    def __str__(self) -> str:
        return f"{self.field} {_short(self.stored)}, not {_short(self.wanted)}"


def plain(values: object, *, name: str, nested: bool) -> dict[str, Any]:
    """`values` in the form that reading them from a file gives.

    Args:
        values: A mapping of text to what JSON can hold.
        name: What errors call it.
        nested: Whether values may be mappings themselves.

    Raises:
        ConfigError: It is no such mapping, or a value is of another kind.
    """
    if isinstance(values, Plain):
        return values
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{name}={values!r:.80} is no mapping of text to values: give a dict")
    return Plain(
        {
            str(key): _plain(values[key], where=f"{name}[{key!r}]", nested=nested, depth=_DEPTH)
            for key in values
        }
    )


def text_of(values: Mapping[str, Any]) -> str:
    """The one text of what `plain` gives: equal values have equal text, 1 and True do not.

    Raises:
        ValueError: A number is too long to be written.
    """
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def file_name(identity: Mapping[str, Any]) -> str:
    """The name of the file that holds the executable of an identity."""
    return hashlib.sha256(text_of(identity).encode()).hexdigest()[:32] + SUFFIX


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The fields in which two identities differ, by name."""
    if text_of(stored) == text_of(wanted):
        return ()
    pairs = ((field, _text(stored, field), _text(wanted, field)) for field in {**stored, **wanted})
    return tuple(sorted(Difference(*pair) for pair in pairs if pair[1] != pair[2]))


def in_words(found: Iterable[Difference]) -> str:
    """Differences as the end of a sentence, the first few of many."""
    words = [str(difference) for difference in found]
    if left_out := words[_MOST:]:
        words[_MOST:] = [f"{len(left_out)} more that differ"]
    return " and ".join(words)


def _plain(value: object, *, where: str, nested: bool, depth: int) -> Any:
    if depth == 0:
        raise ConfigError(f"{where} is nested more than {_DEPTH} deep: give less")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return _writable(int(value), where)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(item, where=where, nested=nested, depth=depth - 1) for item in value]
    if nested and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {
            str(key): _plain(value[key], where=f"{where}[{key!r}]", nested=True, depth=depth - 1)
            for key in value
        }
    kinds = "text, a finite number, a bool, None, or a list of them"
    raise ConfigError(f"{where}={value!r} cannot stand in a header: give {kinds}")


def _writable(number: int, where: str) -> int:
    if number.bit_length() > 1024:
        raise ConfigError(f"{where} is an integer of {number.bit_length()} bits: give a hash of it")
    return number


def _text(values: Mapping[str, Any], field: str) -> str | None:
    if field not in values:
        return None
    return json.dumps(values[field], sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _short(text: str | None) -> str:
    if text is None:
        return "missing"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
