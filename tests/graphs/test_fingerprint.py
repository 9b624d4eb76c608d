"""Fingerprints: what stands for a function, the same in every process."""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

from cudagraph_jax.graphs.fingerprint import fingerprint_of, written


def code_of(source: str) -> str:
    """The hash of the function that `source` defines."""
    space: dict[str, object] = {}
    exec(compile(source, "source", "exec"), space)
    function = space["f"]
    assert callable(function)
    return fingerprint_of(function, "v1").code


def test_an_edit_is_noticed():
    """Other bytecode, constants and inner functions give another hash; comments and places none."""
    plain = code_of("def f(x): return x * 2")
    assert code_of("\n\n# moved\ndef f(x):\n    'told'\n    return x * 2") != ""
    assert code_of("\n\ndef f(x): return x * 2  # moved") == plain
    others = [
        code_of("def f(x): return x * 3"),
        code_of("def f(x): return x + 2"),
        code_of("def f(x): return g(x) * 2"),
        code_of("def f(x): return (lambda y: y * 2)(x)"),
        code_of("def f(x): return (lambda y: y * 3)(x)"),
    ]
    assert len({plain, *others}) == 6


def test_it_is_the_same_in_every_process():
    """Neither hash seeds nor addresses show."""
    script = (
        "from cudagraph_jax.graphs.fingerprint import fingerprint_of, written\n"
        "def f(x): return x in {'a', 'b', 'c'}, lambda y: y\n"
        "print(fingerprint_of(f, 'v1'), written(frozenset({'a', 'b', 'c'})))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_a_partial_is_known_by_its_function():
    """functools.partial is looked through; what it binds is for its author to name."""

    def function(x, scale):
        return x * scale

    fingerprint = fingerprint_of(functools.partial(function, scale=2), "v1")
    assert fingerprint == fingerprint_of(function, "v1")
    assert fingerprint.function.endswith("function")


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Options:
    size: int
    parts: tuple[str, ...] = ()


class Pair(NamedTuple):
    left: int
    right: int


WRITTEN = [
    None, True, 1, 1.0, "1", b"1", 1j, np.dtype("float32"), Colour.RED, int, (1, 2), (1, (2,)),
    frozenset({1, 2}), Options(1), Options(2), Options(1, ("a",)), Pair(1, 2), {"a": 1},
]  # fmt: skip


def test_what_differs_is_written_differently():
    """Values that are not the same have texts that are not, and equal ones the same text."""
    texts = [written(value) for value in WRITTEN]
    assert None not in texts
    assert len(set(texts)) == len(texts)
    assert written(Options(1, ("a",))) == written(Options(1, ("a",)))


@pytest.mark.parametrize("value", [object(), lambda: 1, (object(),), Options(object())])  # type: ignore[arg-type]
def test_what_has_no_name(value):
    """What another process could not name has no text, wherever it stands."""
    assert written(value) is None
