"""Fingerprints: what stands for a function, the same in every process."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from cudagraph_jax.graphs.fingerprint import fingerprint_of
from cudagraph_jax.graphs.written import written, written_structure


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
        "from cudagraph_jax.graphs.fingerprint import fingerprint_of\n"
        "from cudagraph_jax.graphs.written import written\n"
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


def scaled(x, scale):
    """A function of two arguments."""
    return x * scale


class Net:
    """A model with a method and data of its own."""

    def __init__(self, factor):
        self.factor = factor

    def apply(self, x):
        return x * self.factor


def closing_over(value):
    return lambda x: x * value


def test_what_a_function_holds():
    """Defaults, bound arguments, closures and what is wrapped are part of it."""
    functions = [
        scaled,
        functools.partial(scaled, scale=2),
        functools.partial(scaled, scale=3),
        lambda x, scale=2: x * scale,
        lambda x, scale=3: x * scale,
        lambda x, *, scale=4: x * scale,
        lambda x, *, scale=5: x * scale,
        closing_over(2),
        closing_over(3),
        closing_over(np.arange(3)),
        closing_over(np.arange(4)),
        jax.jit(closing_over(8)),
        jax.vmap(closing_over(4)),
        jax.vmap(closing_over(5)),
        functools.wraps(scaled)(closing_over(6)),
        functools.wraps(scaled)(closing_over(7)),
    ]
    found = [fingerprint_of(function, "v1") for function in functions]
    codes = {(fingerprint.function, fingerprint.code) for fingerprint in found}
    assert len(codes) == len(functions)
    assert all(fingerprint.unsure is None for fingerprint in found[:12])
    assert found[1].function.endswith("scaled")


def test_what_a_function_holds_unseen():
    """What cannot be written is remembered, so that no other function passes for it."""
    first, second = Net(2).apply, Net(3).apply
    assert not fingerprint_of(first, "v1").is_taken()
    assert not fingerprint_of(first, "v1").is_taken()
    assert fingerprint_of(second, "v1").is_taken()
    assert not fingerprint_of(second, "v2").is_taken()
    assert not fingerprint_of(closing_over(2), "v1").is_taken()
    assert not fingerprint_of(closing_over(2), "v1").is_taken()


def test_a_function_that_closes_over_itself():
    """Recursion in closures ends."""

    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    assert fingerprint_of(even, "v1").unsure is None


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


def local_class(number):
    class Local:
        factor = number

    return Local


class Longer(Options):
    """A dataclass's subclass that is none itself, with more than its fields."""


class Text(str):
    """Text that may hold more than it shows."""

    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        object(), lambda: 1, (object(),), [object()], local_class(2), local_class(2)(),
        Longer(1), Text("a"), {"a": object()},
    ],
)  # fmt: skip
def test_what_has_no_name(value):
    """What another process could not name has no text, wherever it stands."""
    assert written(value) is None


def structure(tree):
    return written_structure(jax.tree.structure(tree))


def test_structures():
    """Pytrees of known kinds have texts that tell them apart; those of local classes have none."""
    trees = [
        1, None, (1,), [1], (1, 2), ((1,), 2), {"a": 1}, {"b": 1}, {"a": 1, "b": 2}, Pair(1, 2),
        collections.OrderedDict(a=1), (None, 1), (1, None),
    ]  # fmt: skip
    texts = [structure(tree) for tree in trees]
    assert None not in texts
    assert len(set(texts)) == len(texts)

    class Local(NamedTuple):
        left: int
        right: int

    assert structure(Local(1, 2)) is None
    assert structure((1, {"a": Local(1, 2)})) is None


class Node:
    """A pytree node with data of its own, which its text does not show."""

    def __init__(self, child, data):
        self.child, self.data = child, data

    def __repr__(self):
        return "Node"


jax.tree_util.register_pytree_node(
    Node, lambda node: ((node.child,), node.data), lambda data, children: Node(children[0], data)
)


def test_nodes_of_ones_own():
    """A node's data count, and where they cannot be written the structure has no text."""
    assert structure(Node(1, ("a", 1))) != structure(Node(1, ("a", 2)))
    assert structure(Node(1, object())) is None
