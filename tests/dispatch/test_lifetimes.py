"""What a manager holds goes with the function that it was captured for."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, CUDAGraphWarning, bucket_jit
from tests.helpers.faults import busy
from tests.helpers.functions import GRID, assert_close, floats, stats_of

X = floats(0, 2, 4)


class Constant(np.ndarray):
    """An array that can be referred to weakly."""


def numpy_constant():
    return np.ones(1000, np.float32).view(Constant)


CONSTANTS = {"numpy": numpy_constant, "jax": lambda: jnp.ones(1000)}


def adding(constant):
    return lambda x: x + constant[0]


def multiplying(factor):
    return lambda x: x * factor


def through_bucket_jit(manager, function):
    return bucket_jit(function, in_axes="batch seq", manager=manager)


def through_execute(manager, function):
    return lambda x: manager.execute_or_capture(*x.shape, function, x)


DOORS = pytest.mark.parametrize("door", [through_bucket_jit, through_execute])


@DOORS
@pytest.mark.parametrize("kind", CONSTANTS)
def test_a_function_goes_with_its_constants(door, kind):
    """Of functions made anew for each call none stays, nor an array that they close over."""
    manager = CUDAGraphManager(GRID)
    gone = []
    for _ in range(5):
        constant = CONSTANTS[kind]()
        gone.append(weakref.ref(constant))
        function = adding(constant)
        gone.append(weakref.ref(function))
        called = door(manager, function)
        assert_close(np.asarray(called(X)), X + 1)
        del constant, function, called
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)
    assert manager.registry.num_graphs <= 1


def test_decorating_again_frees_the_old_one():
    """A function that is redefined takes its graphs along, also where the manager is shared."""
    manager = CUDAGraphManager(GRID)
    kept = bucket_jit(lambda x: x - 1, in_axes="batch seq", manager=manager)
    kept(X)
    for factor in range(5):
        again = bucket_jit(multiplying(factor), in_axes="batch seq", manager=manager)
        assert_close(again(X), X * factor)
        assert_close(again(floats(0, 4, 5)), floats(0, 4, 5) * factor)
    assert manager.registry.num_graphs == 3
    del again
    assert manager.registry.num_graphs == 1
    hits = stats_of(manager)["hits"]
    assert_close(kept(X), X - 1)
    assert stats_of(manager)["hits"] == hits + 1


class Service:
    """An object whose method is served, as bucketed, or by the manager itself."""

    def __init__(self, manager):
        self.weights = np.full(1000, 2, np.float32)
        self.embed = bucket_jit(self.scaled, in_axes="batch seq", manager=manager)

    def scaled(self, x):
        return x * self.weights[0]


def test_a_service_goes_although_its_manager_stays():
    """A manager that is shared keeps no object whose methods it served."""
    manager = CUDAGraphManager(GRID)
    service = Service(manager)
    assert_close(service.embed(X), X * 2)
    for _ in range(2):
        assert_close(manager.execute_or_capture(2, 4, service.scaled, X), X * 2)
    assert stats_of(manager)["hits"] == 1
    gone = weakref.ref(service)
    del service
    gc.collect()
    assert gone() is None
    assert manager.registry.num_graphs == 1  # which replay_graph serves


def test_failures_go_too():
    """What failed for a function is forgotten with it."""
    manager = CUDAGraphManager(GRID)

    def fails(x):
        return x * float(np.asarray(x)[0, 0])

    for door in (through_bucket_jit, through_execute):
        function = functools.partial(fails)
        with pytest.warns(CUDAGraphWarning, match="runs eagerly"):
            door(manager, function)(X)
        del function
        gc.collect()
        assert stats_of(manager)["failed_buckets"] == 0


def test_a_graph_without_its_function_serves_until_there_is_another():
    """`replay_graph` names no function: it finds the graph of a lambda that was given in a call."""
    manager = CUDAGraphManager(GRID)
    assert_close(manager.execute_or_capture(2, 4, lambda x: x * 2, X), X * 2)
    assert manager.registry.num_graphs == 1
    assert_close(manager.replay_graph(2, 4, X), X * 2)
    assert_close(manager.execute_or_capture(2, 4, lambda x: x * 3, X), X * 3)
    assert_close(manager.replay_graph(2, 4, X), X * 3)
    assert manager.registry.num_graphs == 1
    entry = manager.capture_graph(2, 4, lambda x: x * 5, (2, 4))
    assert entry is not None
    gc.collect()
    assert manager.registry.find(entry.bucket, entry.variant) is entry
    assert_close(entry.replay(X), X * 5)
    assert entry.inspect() is not None  # which compiles once more


class Scale:
    """A function that is equal to others."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor

    def __eq__(self, other):
        return isinstance(other, Scale) and self.factor == other.factor

    def __hash__(self):
        return hash(self.factor)


class Slotted:
    """A function that cannot be referred to weakly."""

    __slots__ = ()

    def __call__(self, x):
        return x * 2


class Unhashable(Scale):
    """A function that is equal to others, and cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("make", "hits"), [(lambda: Scale(2), 3), (Slotted, 2), (lambda: Unhashable(2), 2)]
)
def test_which_functions_share_a_graph(make, hits):
    """Functions that are equal share a graph; those that cannot be hashed are each their own."""
    manager = CUDAGraphManager(GRID)
    function = make()
    for _ in range(3):
        assert_close(manager.execute_or_capture(2, 4, function, X), X * 2)
    assert stats_of(manager)["hits"] == 2
    again = make()
    assert_close(manager.execute_or_capture(2, 4, again, X), X * 2)
    assert stats_of(manager)["hits"] == hits
    other = Unhashable(7) if isinstance(function, Unhashable) else Scale(7)
    assert_close(manager.execute_or_capture(2, 4, other, X), X * 7)


def test_a_later_function_at_the_same_place_is_another():
    """A new function that takes the memory of an old one is never served by its graph."""
    manager = CUDAGraphManager(GRID)
    for factor in range(1, 30):
        assert_close(manager.execute_or_capture(2, 4, multiplying(factor), X), X * factor)


def test_the_background_captures_nothing_for_nobody():
    """A function that goes while its capture waits leaves nothing behind."""
    manager = CUDAGraphManager(dataclasses.replace(GRID, on_miss="background"))
    go = busy(manager)
    bucket_jit(lambda x: x * 2, in_axes="batch seq", manager=manager)(X)
    go.set()
    manager.wait()
    assert manager.registry.num_graphs == 0
    assert stats_of(manager)["failed_buckets"] == 0


def test_a_kept_answer_keeps_about_its_own_size():
    """Small answers of a large bucket keep no bucket; all of them are read-only."""
    function = bucket_jit(
        lambda x: jnp.broadcast_to(x[..., None], (*x.shape, 64)) * 2,
        in_axes="batch seq",
        config=CUDAGraphConfig(capture_sizes=(64,), capture_seq_lens=(128,), warmup_iterations=1),
    )

    bucket_bytes = 64 * 128 * 64 * 4

    def kept_bytes(answer):
        """What goes only when the answer does."""
        return answer.nbytes if answer.base is None else bucket_bytes

    for batch, seq in [(1, 3), (2, 64), (31, 128), (32, 128), (60, 128), (64, 128)]:
        x = floats(0, batch, seq)
        answer: Any = function(x)
        assert not answer.flags.writeable
        assert_close(answer, np.repeat(x[..., None] * 2, 64, axis=2))
        assert kept_bytes(answer) <= 2 * answer.nbytes


@pytest.mark.parametrize("policy", ["eager", "split", "exact"])
def test_all_answers_on_the_host_are_read_only(policy):
    """So they are within the grid and outside of it, whatever the function gives."""
    config = CUDAGraphConfig(
        capture_sizes=(1, 4), capture_seq_lens=(8,), on_overflow=policy, warmup_iterations=0
    )
    own = np.zeros(3, np.float32)

    def several(x):
        constants = {} if policy == "split" else {"own": own, "number": 3.0, "scalar": np.int32(2)}
        return {"x": x, "twice": x * 2, **constants}

    function = bucket_jit(several, in_axes="batch seq", config=config)
    for shape in ((1, 1), (3, 5), (4, 8), (9, 5)):
        x = np.ones(shape, np.float32)
        answers = function(x)
        assert not any(leaf.flags.writeable for leaf in jax.tree.leaves(answers))
        assert x.flags.writeable
    assert own.flags.writeable


def test_a_function_that_closes_over_a_ref():
    """Each call writes to it once, as under `jit`, be it replayed or run eagerly."""
    counter = jax.new_ref(jnp.zeros((), jnp.int32))

    def counted(x):
        counter[...] += 1
        return x + counter[...]

    function = bucket_jit(counted, in_axes="batch seq", config=GRID)
    for calls, rows in enumerate((2, 2, 3, 9), start=1):
        assert_close(
            function(np.zeros((rows, 4), np.float32)), np.full((rows, 4), calls, np.float32)
        )
    assert stats_of(function)["eager_by_reason"] == {"overflow": 1}
