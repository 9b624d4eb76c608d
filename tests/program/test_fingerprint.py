"""Fingerprints: what stands for a function, the same in every process."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, CUDAGraphWarning, bucket_jit
from cudagraph_jax.program.fingerprint import (
    comparable,
    comparable_structure,
    digest_of,
    fingerprint_of,
    written,
    written_structure,
)


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
        "import math, jax\n"
        "from cudagraph_jax.program.fingerprint import fingerprint_of\n"
        "from cudagraph_jax.program.fingerprint import written\n"
        "W, NAMES, MODEL = 2.0, {'a', 'b', 'c'}, object()\n"
        "def g(x): return f(x), math.pi, W, NAMES, MODEL\n"
        "def f(x): return x in {'a', 'b', 'c'}, lambda y: jax.vmap(g)(y)\n"
        "found = fingerprint_of(f, 'v1')\n"
        "print(found, found.code, written(frozenset({'a', 'b', 'c'})))"
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
    named = b"Fingerprint(given='v1', source=Source(__main__.f), places=()) "
    assert printed.pop().startswith(named)


MODULE = """
import jax, math
W = {w}
class Layer:
    factor = {factor}
def helper(x): return x * {inner}
def other(x): return x * {other}
vmapped = jax.vmap(helper)
{function}
"""
SOUND = {"w": 2.0, "inner": 3, "other": 4, "factor": 5}
READS = {
    "a constant": ("def f(x): return x * W", "w"),
    "a constant in an inner function": ("def f(x): return (lambda y: y * W)(x)", "w"),
    "a constant of a callee": ("def g(x): return x * W\ndef f(x): return g(x)", "w"),
    "a callee": ("def f(x): return helper(x)", "inner"),
    "a callee of a closure": (
        "def f(x): return x\nf = (lambda g: lambda x: g(x))(vmapped)",
        "inner",
    ),
    "a callee in a transformation": ("def f(x): return jax.vmap(helper)(x)", "inner"),
    "a transformed callee": ("def f(x): return vmapped(x)", "inner"),
    "a callee that calls it": ("def g(x): return f(x) * W\ndef f(x): return g(x)", "w"),
}


def module_code(function: str, **values: object) -> str:
    """The hash of `f` in a module with these values."""
    return code_of(MODULE.format(function=function, **{**SOUND, **values}))


@pytest.mark.parametrize(("function", "read"), READS.values(), ids=READS)
def test_what_is_read_by_a_global_name_is_noticed(function, read):
    """Constants and callees of the module are part of a function; what it does not read is not."""
    code = module_code(function)
    assert module_code(function) == code
    for name in SOUND:
        assert (module_code(function, **{name: 9}) != code) == (name == read), name


@pytest.mark.parametrize(
    "function", ["def f(x): return math.sin(x)", "def f(x): return Layer.factor"]
)
def test_what_is_not_read(function):
    """What stands behind an attribute of a module or of a class is not noticed."""
    code = module_code(function)
    assert {module_code(function, **{name: 9}) for name in SOUND} == {code}


def test_a_global_that_is_defined_later():
    """A function is read when a store is asked, since its globals may stand below it."""
    space: dict[str, Any] = {}
    exec("def f(x): return x * W", space)
    codes = set()
    for w in (2, 3):
        fingerprint = fingerprint_of(space["f"], "v1")
        space["W"] = w
        codes.add(fingerprint.code)
    assert len(codes) == 2


def in_a_module(name: str, source: str, **more: object) -> dict[str, Any]:
    """What a module of this name defines."""
    space: dict[str, Any] = {"__name__": name, **more}
    exec(compile(source, "source", "exec"), space)
    return space


def imported_module(monkeypatch, name: str, source: str) -> ModuleType:
    """A module of this name, imported."""
    module = ModuleType(name)
    exec(compile(source, "source", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_callees_of_a_package(monkeypatch):
    """Functions of the same package are read wherever they stand, those of others not."""

    def code(name: str, factor: int) -> str:
        source = f"def helper(x): return x * {factor}"
        helper = imported_module(monkeypatch, name, source).helper
        source = "def f(x): return helper(x)"
        return fingerprint_of(in_a_module("mine.model", source, helper=helper)["f"], "v1").code

    assert code("mine.layers", 2) != code("mine.layers", 3)
    assert code("theirs.layers", 2) == code("theirs.layers", 3) != code("theirs.heads", 2)


MADE = """
import functools
def made(factor): return lambda x: x * factor
def helper(x): return x
"""


def test_callables_that_another_package_made(monkeypatch):
    """Only what is found there by its own name is another package's; what is not is read."""
    theirs = imported_module(monkeypatch, "theirs.layers", MADE)

    def code(helper: Callable[..., object]) -> str:
        space = in_a_module("mine.model", "def f(x): return helper(x)", helper=helper)
        return fingerprint_of(space["f"], "v1").code

    disguised = [functools.wraps(theirs.helper)(closing_over(factor)) for factor in (2, 3)]
    assert len({code(theirs.made(2)), code(theirs.made(3)), *map(code, disguised)}) == 4
    assert code(theirs.made(2)) == code(theirs.made(2))


WRAPPING = [
    jax.jit, jax.vmap, jax.checkpoint, jax.grad, jnp.vectorize,
    functools.partial(jax.named_call, name="g"), functools.lru_cache,
]  # fmt: skip


@pytest.mark.parametrize("partial", [functools.partial, jax.tree_util.Partial])
@pytest.mark.parametrize("wrap", WRAPPING)
def test_globals_that_wrap_a_partial(wrap, partial):
    """They are read, though they have the name of no function."""
    codes = set()
    for scale, factor in ((2, 3), (2, 4), (3, 3)):
        space = in_a_module("mine", f"def scaled(k, x): return x * k * {factor}", wrap=wrap)
        exec("def f(x): return g(x)", space)
        space["g"] = wrap(partial(space["scaled"], scale))
        codes.add(fingerprint_of(space["f"], "v1").code)
    assert len(codes) == 3


RULES = """
import jax
@jax.custom_{kind}
def h(x): return x * {factor}
{rules}
def f(x): return h(x)
"""
JVP = "h.defjvp(lambda primals, tangents: (h(*primals), tangents[0] * {slope}))"
VJP = "h.defvjp(lambda x: (h(x), None), lambda _, cotangent: (cotangent * {slope},))"


@pytest.mark.parametrize(("kind", "rules"), [("jvp", JVP), ("vjp", VJP)])
@pytest.mark.parametrize("name", ["f", "h"])
def test_functions_with_rules_of_their_own(kind, rules, name):
    """A function with derivatives of its own is read, and so are these."""
    found = []
    for factor, slope in ((2, 2), (3, 2), (2, 3)):
        source = RULES.format(kind=kind, factor=factor, rules=rules.format(slope=slope))
        found.append(fingerprint_of(in_a_module("mine", source)[name], "v1"))
    assert len({fingerprint.code for fingerprint in found}) == 3
    assert all(fingerprint.unsure is None for fingerprint in found)


def test_what_jax_has_is_known_by_name():
    """Its own functions are not read: the versions tell them apart."""
    for act in (jnp.add, jnp.tanh, jax.nn.relu, jax.nn.gelu, jnp.linalg.norm):
        assert fingerprint_of(closing_over(act), "v1").unsure is None


VALUES = [
    "slice(0, {})", "types.MappingProxyType({{'k': {}}})", "collections.deque([{}])",
    "fractions.Fraction({}, 7)", "np.array([{}, None], object)", "operator.itemgetter({})",
    "{{'k': {}}}.get", "np.full(3, {}).sum", "[{}].__len__", "collections.deque([{}]).count",
    "decimal.Decimal({})", "datetime.timedelta({})", "re.compile('{}')", "pathlib.Path('{}')",
    "range({})", "collections.Counter([{}])", "collections.defaultdict(int, k={})",
    "fractions.Fraction({}).limit_denominator", "np.ma.masked_array([{}])",
]  # fmt: skip
NAMESPACE = "import types, collections, fractions, operator, decimal, datetime, re, pathlib"


@pytest.mark.parametrize("value", VALUES)
def test_values_of_pythons_own_kinds(value):
    """Whatever a global name leads to that Python or NumPy made is read, and not unsure."""
    found = []
    for number in (2, 3, 2):
        source = f"W = {value.format(number)}\ndef f(x): return W"
        space = in_a_module("mine", f"{NAMESPACE}\nimport numpy as np\n{source}")
        found.append(fingerprint_of(space["f"], "v1"))
    assert found[0].code == found[2].code
    assert found[0].code != found[1].code
    assert found[0].unsure is None


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_attributes_of_functions(wrap):
    """What is set on a function is a part of it."""
    codes = set()
    for factor in (2, 3):
        space = in_a_module("mine", "def f(x): return x * f.k", wrap=wrap)
        space["f"] = wrap(space["f"])
        space["f"].k = factor
        codes.add(fingerprint_of(space["f"], "v1").code)
    assert len(codes) == 2


@pytest.mark.parametrize(
    "value",
    [threading.Lock(), memoryview(b""), itertools.count(), jnp.arange(2), {len, max}, [object()]],
)
def test_globals_that_are_not_sure(value):
    """What cannot be read is known to be so."""
    space = in_a_module("mine", "def f(x): return W", W=value)
    assert fingerprint_of(space["f"], "v1").unsure is not None


def test_a_long_chain_of_calls():
    """However long a chain of calls is, its end is noticed."""
    count = 3000
    chain = "\n".join(f"def g{n}(x): return g{n + 1}(x)" for n in range(count))
    codes = {
        code_of(f"{chain}\ndef g{count}(x): return x * {factor}\ndef f(x): return g0(x)")
        for factor in (2, 3)
    }
    assert len(codes) == 2


def test_globals_that_cannot_be_written():
    """They make a function one that another may pass for; those of other packages do not."""
    space: dict[str, Any] = {}
    exec("W = object()\nL = []\nL.append(L)\ndef f(x): return W\ndef g(x): return L", space)
    unsure = [fingerprint_of(space[name], "v1").unsure for name in ("f", "g")]
    assert unsure == [space["f"], None]
    exec("from jax.numpy import tanh\ndef f(x): return tanh(x[..., None])", space)
    assert fingerprint_of(space["f"], "v1").unsure is None


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
    known = fingerprint_of(first, "v1")
    assert not known.is_taken()
    assert not fingerprint_of(first, "v1").is_taken()
    assert fingerprint_of(second, "v1").is_taken()
    assert not fingerprint_of(second, "v2").is_taken()
    one, other = closing_over(2), closing_over(2)
    assert not fingerprint_of(one, "v1").is_taken()
    assert not fingerprint_of(other, "v1").is_taken()
    del known, first
    assert not fingerprint_of(second, "v1").is_taken()


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
    None, ..., True, 1, 1.0, "1", b"1", 1j, np.dtype("float32"), Colour.RED, int, (1, 2), (1, (2,)),
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


def doubled(x):
    return x * 2


def tripled(x):
    return x * 3


def applied(x, act):
    return act(x)


class Wrapper:
    """A callable object that does more than what it wraps."""

    def __init__(self, function, factor):
        self.__wrapped__ = function
        self.factor = factor

    def __call__(self, x):
        return self.__wrapped__(x) * self.factor


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([doubled], [tripled]),
        ((doubled, tripled, doubled), (doubled, tripled, tripled)),
        ({"g": doubled}, {"g": tripled}),
        ([[doubled], []], [[], [doubled]]),
        (collections.OrderedDict(k=2.0), collections.OrderedDict(k=3.0)),
        (SimpleNamespace(act=doubled), SimpleNamespace(act=tripled)),
        (functools.partial(applied, act=doubled), functools.partial(applied, act=tripled)),
        (doubled, tripled),
    ],
)
def test_what_is_inside_of_containers(one, other):
    """Functions and values in containers are read, and which of them stands where."""
    functions = [closing_over(value) for value in (one, other, one)]
    codes = [fingerprint_of(function, "v1") for function in functions]
    assert codes[0].code != codes[1].code
    assert codes[0].code == codes[2].code
    assert codes[0].unsure is None


def test_functions_that_occur_twice():
    """Which function it is that occurs again is part of the code."""

    def three(a, b, c):
        def held(x):
            return a(x) * b(x) * c(x)

        return held

    given = itertools.product((doubled, tripled), repeat=3)
    functions = [three(*each) for each in given]
    assert len({fingerprint_of(function, "v1").code for function in functions}) == 8


def test_defaults_that_are_functions():
    """A keyword's default is read like a positional one."""
    codes = {
        code_of(f"def g(x): return x * {factor}\ndef f(x, *, act=g): return act(x)")
        for factor in (2, 3)
    }
    assert len(codes) == 2


def test_objects_that_wrap_a_function():
    """What the object itself holds is not seen, and that is known; jax's own hold nothing."""
    assert fingerprint_of(Wrapper(doubled, 2), "v1").unsure is not None
    assert fingerprint_of(jax.jit(doubled), "v1").unsure is None


class Layers(list[object]):
    """A list that holds more than its items."""

    factor = 2


def test_containers_that_may_hold_more_are_not_sure():
    """What a subclass of a list holds besides, and what is nested without end, is not seen."""
    assert fingerprint_of(closing_over(Layers([doubled])), "v1").unsure is not None
    deep: list[object] = [doubled]
    for _ in range(2000):
        deep = [deep]
    assert fingerprint_of(closing_over(deep), "v1").unsure is not None


class Hashless:
    """A model whose hash is that of its arrays, which have none."""

    def __init__(self, weights):
        self.weights = weights

    def __eq__(self, other):
        return self is other

    def __hash__(self):
        return hash(self.weights)

    def __call__(self, x):
        return x * self.weights


def test_models_that_cannot_be_hashed(tmp_path):
    """They may have a fingerprint, and be called by the specification's calls."""
    model, x = Hashless(np.full(1, 3, np.float32)), np.ones((3, 5), np.float32)
    manager = CUDAGraphManager(CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,)))
    call = bucket_jit(
        model, in_axes="batch seq", store=tmp_path / "s", fingerprint="v1", config=manager.config
    )
    with pytest.warns(CUDAGraphWarning, match="closes over 4 bytes"):
        call(x)
    for _ in range(2):
        np.testing.assert_array_equal(call(x), x * 3)
        np.testing.assert_array_equal(manager.execute_or_capture(3, 5, model, x), x * 3)


class Opaque:
    """An object of somebody's own, which has no text."""


@pytest.mark.parametrize(
    "make",
    [
        lambda value: lambda x: x * value,
        lambda value: functools.partial(jnp.sum, axis=value),
        lambda value: frozenset({"a", "b", str(value)}),
        lambda value: {"act": lambda x: x + value},
        lambda value: [jax.nn.relu, jax.nn.gelu][value],
    ],
    ids=["function", "partial", "set", "dictionary", "of JAX"],
)
def test_what_can_be_compared(make):
    """It is the same for what is made alike elsewhere, and another for what is made otherwise."""
    one, same, other = make(0), make(0), make(1)
    assert comparable(one) == comparable(same) != comparable(other)
    assert digest_of([one]) == digest_of([same])
    nodes = [jax.tree.structure(Node(jnp.ones(2), data)) for data in (one, same, other)]
    texts = list(map(comparable_structure, nodes))
    assert texts[0] == texts[1] != texts[2]


def test_what_says_nothing_of_what_it_holds():
    """It is known by its class alone, and not by where it stands."""
    assert comparable(Opaque()) == comparable(Opaque())
    assert "Opaque" in comparable(Opaque())
    assert digest_of([Opaque()]) == digest_of([Opaque()])


def test_what_is_deeply_nested():
    """Its text does not grow twofold with each level for ever."""
    nested: Any = {"a": 1.0}
    for _ in range(60):
        nested = [{"a": (nested, "it's")}]
    for text in (written(nested), written_structure(jax.tree.structure(nested))):
        assert text is not None
        assert len(text) < 2**20
