"""Compiled functions as bytes: they come back the same, and nothing else is unpickled."""

from __future__ import annotations

import functools
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import StoreError
from cudagraph_jax.xla import serialize
from tests.helpers.processes import said_by

STRUCT = jax.ShapeDtypeStruct


def compiled_of(function, *args, **options):
    """A compiled function, its bytes, and a way to load them."""
    lowered = jax.jit(function, **options).lower(*args)
    compiled = lowered.compile()
    data = serialize.dump(compiled)
    load = functools.partial(
        serialize.load,
        inputs=jax.tree.structure((args, {})),
        outputs=jax.tree.structure(lowered.out_info),
        devices=jax.devices()[:1],
    )
    return compiled, data, load


FUNCTIONS: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "matrix": (lambda x: jnp.tanh(x @ x.T), [np.ones((4, 4), np.float32)]),
    "tree": (lambda p, x: {"y": (p["w"] * x, None)}, [{"w": np.ones(3, np.float32)}, np.ones(3)]),
    "unused": (lambda x, y: y + 1, [np.ones(3, np.float32), np.ones(3, np.int32)]),
    "bfloat16": (lambda x: x * 2, [np.ones(3, jnp.bfloat16)]),
    "float8": (lambda x: x, [np.ones(3, jnp.float8_e4m3fn)]),
    "int4": (lambda x: x, [np.ones(3, jnp.int4)]),
    "bool": (lambda x: ~x, [np.ones(3, np.bool_)]),
    "complex": (lambda x: x * 1j, [np.ones(3, np.complex64)]),
    "loop": (lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y * 2, x), [np.ones(3, np.float32)]),
    "sort": (jnp.sort, [np.arange(9.0, dtype=np.float32)[::-1].copy()]),
}


@pytest.mark.parametrize("refs", [0, 1, 2])
def test_where_arguments_go_beside_refs(refs):
    """What a function closes over is no argument, nor is one that it does not use."""
    counters = [jax.new_ref(jnp.zeros(())) for _ in range(refs)]

    def counted(unused, x):
        for counter in counters:
            counter[...] += 1
        return x * 2

    args = np.ones(3, np.float32), np.ones(2, np.float32)
    unused, used = serialize.input_shardings(jax.jit(counted).lower(*args).compile())
    assert unused is None
    assert used is not None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loaded_function_computes_the_same(name):
    """What is loaded gives bit for bit what was compiled."""
    function, args = FUNCTIONS[name]
    compiled, data, load = compiled_of(function, *args)
    same = jax.tree.map(np.array_equal, compiled(*args), load(data)(*args))
    assert jax.tree.all(same)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys(impl):
    """Keys of every kind go in and out of a loaded function."""
    key = jax.random.key(3, impl=impl)
    function = lambda key: (jax.random.split(key), jax.random.normal(key, (3,)))  # noqa: E731
    compiled, data, load = compiled_of(function, key)
    keys, values = load(data)(key)
    assert np.array_equal(values, compiled(key)[1])
    assert np.array_equal(jax.random.key_data(keys), jax.random.key_data(compiled(key)[0]))


def test_a_new_process_loads_everything(tmp_path):
    """Nothing that an executable names is missing in a process that has compiled nothing."""
    keys = [jax.random.key(3, impl=impl) for impl in ("threefry2x32", "rbg", "unsafe_rbg")]
    called = [*FUNCTIONS.values(), *((jax.random.split, [key]) for key in keys)]
    for number, (function, args) in enumerate(called):
        # Compiled anew: XLA cannot write a sort that has run.
        data = compiled_of(functools.partial(function), *args)[1]
        (tmp_path / str(number)).write_bytes(data)
    program = f"""
        import pathlib
        import cudagraph_jax
        from cudagraph_jax.xla import serialize
        for path in pathlib.Path({str(tmp_path)!r}).iterdir():
            serialize.check_pickle(path.read_bytes())
            print(path.name)
    """
    assert len(said_by(program).split()) == len(called)


def test_what_jax_has_moved(monkeypatch):
    """A JAX that has its classes in other modules of its own is no obstacle."""
    function, args = FUNCTIONS["matrix"]
    compiled, data, load = compiled_of(function, *args)
    for name, module in [*sys.modules.items()]:
        if name.startswith("jax._src"):
            monkeypatch.setitem(sys.modules, name.replace("_src", "_new"), module)
    moved = re.sub(rb"(\x8c.jax\.)_src\.", rb"\1_new.", data, flags=re.DOTALL)
    assert moved != data
    assert np.array_equal(load(moved)(*args), compiled(*args))


def test_donation_is_kept():
    """A loaded function uses up what the compiled one did."""
    x = jnp.ones((64, 64))
    _, data, load = compiled_of(lambda x: x + 1, x, donate_argnums=0)
    load(data)(x)
    assert x.is_deleted()


def test_what_calls_the_host_cannot_be_written():
    """A callback lives in its process: that is said."""

    def function(x):
        return jax.pure_callback(np.sin, STRUCT((3,), np.float32), x)

    compiled = jax.jit(function).lower(STRUCT((3,), np.float32)).compile()
    with pytest.raises(StoreError, match="JAX cannot write it"):
        serialize.dump(compiled)


class Planted:
    """Unpickled, it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_planted_pickle_runs_nothing(tmp_path):
    """A pickle that names anything but an executable's own classes is refused unread."""
    path = tmp_path / "planted"
    _, _, load = compiled_of(FUNCTIONS["bool"][0], *FUNCTIONS["bool"][1])
    for data in (pickle.dumps(Planted(path)), pickle.dumps([np.dtype("int8"), Planted(path)])):
        with pytest.raises(StoreError, match=r"names posix\.system, which no executable needs"):
            load(data)
    assert not path.exists()


def test_two_devices():
    """Functions over two devices, and on the second, come back and compute the same."""
    program = """
        import jax
        import numpy as np
        from cudagraph_jax.xla import serialize
        from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

        def back(devices, sharding):
            x = jax.device_put(np.arange(8.0).reshape(4, 2), sharding)
            lowered = jax.jit(lambda x: (x * 2, x.sum())).lower(x)
            compiled = lowered.compile()
            loaded = serialize.load(
                serialize.dump(compiled), inputs=jax.tree.structure(((x,), {})),
                outputs=jax.tree.structure(lowered.out_info), devices=devices)
            for found, expected in zip(loaded(x), compiled(x)):
                assert np.array_equal(found, expected)
                assert found.sharding == expected.sharding, (found.sharding, expected.sharding)

        first, second = jax.devices()
        for devices in ([first, second], [second, first]):
            for shape, names in (((2,), ("a",)), ((2, 1), ("a", "b"))):
                mesh = Mesh(np.array(devices).reshape(shape), names)
                back(devices, NamedSharding(mesh, PartitionSpec("a")))
                back(devices, NamedSharding(mesh, PartitionSpec()))
        back([second], SingleDeviceSharding(second))
        print("the same")
    """
    flags = "--xla_force_host_platform_device_count=2"
    assert said_by(program, flags=flags).endswith("the same\n")


@pytest.mark.parametrize("data", [b"", b"\x80", b"not a pickle", pickle.dumps("x")[:-1]])
def test_what_is_no_pickle(data):
    """Bytes that are no pickle are an error of the store."""
    with pytest.raises(StoreError, match="cannot be followed"):
        serialize.load(data, inputs=None, outputs=None, devices=jax.devices())


def test_a_pickle_of_something_else():
    """A pickle that is harmless and no executable is an error of the store, too."""
    with pytest.raises(StoreError, match="JAX cannot load it"):
        serialize.load(
            pickle.dumps((1, 2)),
            inputs=jax.tree.structure(1),
            outputs=jax.tree.structure(1),
            devices=jax.devices(),
        )
