"""Executables as bytes: written, checked, loaded by `jax.experimental.serialize_executable`."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.stages import Compiled

from cudagraph_jax._base.text import error_line
from cudagraph_jax.errors import StoreError
from cudagraph_jax.shapes.pytrees import PyTree, unflatten_shapes


def dump(compiled: Compiled) -> bytes:
    """An executable as bytes, for this version of JAX and this kind of device.

    Raises:
        StoreError: It cannot be written, or its pickle names what `load` would refuse.
    """
    described = copy.copy(compiled)
    described.args_info = list(map(_described, jax.tree.leaves(compiled.args_info)))
    try:
        data: bytes = serialize_executable.serialize(described)[0]
    except Exception as error:
        raise StoreError(f"JAX cannot write it: {error_line(error)}") from error
    check_pickle(data)
    return data


def load(
    data: bytes,
    *,
    inputs: jax.tree_util.PyTreeDef,
    outputs: jax.tree_util.PyTreeDef,
    devices: Sequence[jax.Device],
) -> Compiled:
    """The executable that `dump` wrote.

    It is native code, which nothing here looks at, so the caller must know that the bytes come
    from `dump`: the store's digest, or its key, is what says so.

    Args:
        data: What `dump` gave.
        inputs: The pytree of `(args, kwargs)`.
        outputs: The pytree of the outputs.
        devices: Those it was compiled for, in their order. JAX would take all of the backend.

    Raises:
        StoreError: It holds something that no executable needs, or cannot be loaded here.
    """
    check_pickle(data)
    try:
        compiled: Compiled = serialize_executable.deserialize_and_load(
            data,
            _Inputs(inputs),
            outputs,
            backend=devices[0].platform,
            execution_devices=list(devices),
        )
    except Exception as error:
        raise StoreError(f"JAX cannot load it: {error_line(error)}") from error
    return compiled


def _described(info: PyTree) -> PyTree:
    """What JAX knows of an argument; of an array that stands for it, its shape alone."""
    if isinstance(info, np.ndarray):
        return jax.ShapeDtypeStruct(info.shape, info.dtype)
    return info


class _Inputs:
    """A pytree of arguments, also one whose classes refuse what JAX knows of its arrays."""

    def __init__(self, structure: jax.tree_util.PyTreeDef) -> None:
        self._structure = structure

    def unflatten(self, infos: Sequence[jax.stages.ArgInfo]) -> PyTree:
        """The pytree, of these or of arrays that stand for them."""
        return unflatten_shapes(self._structure, infos)


def output_leaves(compiled: Compiled) -> list[jax.ShapeDtypeStruct]:
    """The outputs of an executable, with `shape`, `dtype` and `sharding`.

    Without the pytree that they come in, which JAX would make of them: a class of the caller's may
    take nothing but arrays, or those of some shapes.
    """
    flat = copy.copy(compiled)
    structure: jax.tree_util.PyTreeDef = compiled.out_tree
    flat.out_tree = jax.tree.structure([0] * structure.num_leaves)
    leaves: list[jax.ShapeDtypeStruct] = flat.out_info
    return leaves


def input_shardings(compiled: Compiled) -> list[jax.sharding.Sharding | None]:
    """Where an executable takes each leaf of `(args, kwargs)`; None: it does not take that one.

    Without the pytree that they come in, as for `output_leaves`.
    """
    flat = copy.copy(compiled)
    structure: jax.tree_util.PyTreeDef = compiled.in_tree
    # JAX counts the `jax.Ref`s that a function closes over among the inputs, behind all arguments.
    # Of more leaves than there are shardings it says which the executable takes.
    flat.args_info = [0] * (structure.num_leaves + _MOST_REFS)
    shardings: list[jax.sharding.Sharding | None] = flat.input_shardings
    return shardings[: structure.num_leaves]


_MOST_REFS = 1000


_OF_JAX = frozenset({"jax", "jaxlib"})
_OF_PYTHON = {
    "builtins": frozenset({"bytearray", "complex", "frozenset", "range", "set", "slice"}),
    "collections": frozenset({"OrderedDict", "defaultdict", "deque"}),
}
"""Classes of plain values, which may be made while the pickle is looked at."""


def check_pickle(data: bytes) -> None:
    """Accepts a pickle that names only what executables are made of, and makes none of it.

    Such are classes of JAX, its own functions that unpickle, NumPy's arrays and types of numbers,
    and a few containers. Other functions of JAX may be handed on (a kind of random keys has some),
    and not called. No module is imported for a name. Names are resolved, and what counts is where
    the thing found was defined: it does not matter in which of its modules JAX keeps a class, and
    nothing is reached through a module that JAX has imported.

    This is defence in depth and no sandbox. An executable is native code, which nothing looks at,
    and a pickle made for the purpose can still misuse a class of JAX, or take all memory. So the
    bytes of strangers are never safe to load: what says that they come from `dump` is the store's
    digest, the owner of its files, and its key.

    Raises:
        StoreError: It names something else, or is no pickle.
    """
    try:
        # The unpickler may take an extension from a cache, without asking `find_class`.
        if any(opcode.name.startswith("EXT") for opcode, _, _ in pickletools.genops(data)):
            raise StoreError("its pickle uses an extension, which no executable needs")
        _Checker(io.BytesIO(data)).load()
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"its pickle cannot be followed: {error_line(error)}") from error


class _Instance:
    """Stands for a class, and its instances for what JAX's unpickler would make with it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _HandedOn:
    """Stands for a function that is neither called nor changed: an attempt is a `TypeError`."""

    __slots__ = ()


class _Checker(pickle.Unpickler):
    """Follows the same instructions as JAX's unpickler, which asks for the same names."""

    def find_class(self, module: str, name: str) -> object:
        """What stands for something named."""
        found: object = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        home = getattr(found, "__module__", None)
        root = home.partition(".")[0] if isinstance(home, str) else ""
        if root in _OF_PYTHON and module == root and name in _OF_PYTHON[root]:
            return found
        if module.partition(".")[0] in {*_OF_JAX, "numpy", "ml_dtypes"} and callable(found):
            if root in _OF_JAX:
                called = isinstance(found, type) or "unpickle" in name
                return _Instance if called else _HandedOn()
            if (root, name) == ("numpy", "_reconstruct") or _is_numeric(found):
                return _Instance
        raise StoreError(f"its pickle names {module}.{name}, which no executable needs")

    def persistent_load(self, pid: object) -> _Instance:
        """What stands for something of the process that loads it."""
        match pid:
            case ("exec", bytes()) | ("device", int()) | ("client",):
                return _Instance()
        raise StoreError("its pickle refers to something else than devices and their code")


def _is_numeric(found: object) -> bool:
    """Whether it is an array's class, or a type of numbers of NumPy or of ml_dtypes."""
    return found is np.ndarray or (
        isinstance(found, type) and issubclass(found, (np.generic, np.dtype))
    )
