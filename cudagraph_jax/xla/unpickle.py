"""What an executable's pickle may hold: anything else is refused before it is unpickled."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import sys
from collections.abc import Iterator

import numpy as np

from cudagraph_jax.errors import StoreError


def check(data: bytes) -> None:
    """Accepts a pickle of an executable, without making anything that it names.

    It has only instructions that such a pickle uses. What it names is in the tables, and imported
    before. It calls or fills that only with what JAX does: names, numbers and the others stated
    there; types of numbers and arrays of devices exactly as NumPy writes them. So reading it
    imports no module, and calls only JAX's constructors of descriptions and the loader of native
    code.

    Two things it does not do: look at the native code, or bound the time, the memory and the
    stack that a pickle made for the purpose can take.

    Raises:
        StoreError: It is anything else.
    """
    checker = _Checker(io.BytesIO(data))
    try:
        _check_instructions(data)
        checker.accept(checker.load(), "what it holds", _HELD)
        checker.unchanged()
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"its pickle cannot be followed: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


_USED = """
PROTO FRAME STOP MEMOIZE BINGET LONG_BINGET MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE
EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET STACK_GLOBAL
NEWOBJ NEWOBJ_EX REDUCE BUILD BINPERSID
"""
_INSTRUCTIONS = frozenset(_USED.split())
"""Those of protocols 4 and 5 that JAX's pickles need: no extension codes, which the unpickler
takes from a cache without asking for a name, and none of older protocols, which rename."""

_HELD = frozenset({"UnloadedMeshExecutable", "ArgInfo"})
_PLAIN = (type(None), bool, int, str)


class _StandIn:
    """Stands for something that a pickle makes.

    It does nothing, and cannot be hashed: JAX keeps only names and numbers in sets.
    """

    def __init__(self, checker: _Checker, kind: str, value: object = None) -> None:
        self.checker = checker
        self.kind = kind
        self.value = value

    __hash__ = None  # type: ignore[assignment]

    def __setstate__(self, state: object) -> None:
        raise StoreError(f"its pickle changes {self.kind}, which no executable's does")


class _Unfilled(_StandIn):
    """What may not be used before it is filled, and is filled once."""

    def __init__(self, checker: _Checker, kind: str, takes: str = "", value: object = None) -> None:
        super().__init__(checker, f"an unfilled {kind}", value)
        self.filled = kind
        self.takes = frozenset(takes.split())

    def __setstate__(self, state: object) -> None:
        if self.kind == self.filled:
            super().__setstate__(state)
        self.fill(state)
        self.kind = self.filled

    def fill(self, state: object) -> None:
        """Looks at the state: values, or fields by their names, of which some are in slots."""
        if type(state) is tuple and len(state) == 2 and state[0] is None:
            state = state[1]
        if type(state) is dict:
            if not all(type(name) is str and not name.startswith("__") for name in state):
                raise StoreError(f"its pickle sets special attributes of {self.filled}")
            state = tuple(state.values())
        self.checker.accept(state, self.filled, self.takes)


class _DType(_Unfilled):
    """A type of numbers, or the one of an array of devices, with the state that NumPy writes."""

    def fill(self, state: object) -> None:
        if not _identical(state, self.value):
            raise StoreError("its pickle describes a type of numbers as NumPy does not")


class _Devices(_Unfilled):
    """An array of devices, for a mesh."""

    def fill(self, state: object) -> None:
        if type(state) is tuple and len(state) == 5:
            version, shape, dtype, fortran, items = state
            if (
                _identical((version, fortran), (1, False))
                and type(shape) is tuple
                and all(type(size) is int and size >= 0 for size in shape)
                and _kind(dtype) == "object"
                and type(items) is list
                and len(items) == math.prod(shape)
                and all(_kind(item) == "device" for item in items)
            ):
                return
        raise StoreError("its pickle holds an array that is not one of devices")


def _kind(value: object) -> str | None:
    return value.kind if isinstance(value, _StandIn) else None


def _identical(found: object, expected: object) -> bool:
    """Whether plain values are equal, and of the same types."""
    if type(found) is not type(expected):
        return False
    if isinstance(found, tuple) and isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(_identical, found, expected))
    return found == expected


def _check_instructions(data: bytes) -> None:
    end = None
    for opcode, argument, at in pickletools.genops(data):
        if opcode.name not in _INSTRUCTIONS:
            raise StoreError(f"its pickle has the instruction {opcode.name}, which JAX's have not")
        if (opcode.name == "PROTO") != (at == 0) or (at == 0 and argument not in (4, 5)):
            raise StoreError("its pickle is not of protocol 4 or 5")
        end = at
    if end != len(data) - 1:
        raise StoreError("its pickle has something after its end")


def _callable(checker: _Checker, path: str) -> type:
    """What stands for something that is called: a class, since the unpickler asks for one."""

    class Called:
        def __new__(cls, *args: object, **kwargs: object) -> _StandIn:  # type: ignore[misc]
            return checker.make(path, args, kwargs)

        @staticmethod
        def __setstate__(state: object) -> None:
            raise StoreError(f"its pickle changes {path}, which no executable's does")

    return Called


class _Checker(pickle.Unpickler):
    """Follows the same instructions as JAX's unpickler, which asks for the same names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._lengths: list[tuple[list[object] | set[object], int]] = []

    def find_class(self, module: str, name: str) -> object:
        """What stands for something named."""
        path = f"{module}.{name}"
        if "." in name:
            raise StoreError(f"its pickle names {path}, which no executable needs")
        if path in PASSED:
            found: object = _StandIn(self, PASSED[path], name)
        elif path in CALLED or path in FILLED or path in MEMBERS or path in OF_NUMPY:
            found = _callable(self, path)
        else:
            raise StoreError(f"its pickle names {path}, which no executable needs")
        if module not in sys.modules:
            raise StoreError(f"its pickle names {path}, and {module} has not been imported")
        return found

    def persistent_load(self, pid: object) -> _StandIn:
        """What stands for something of the process that loads it."""
        types = {"exec": (str, bytes), "device": (str, int), "client": (str,)}
        if (
            type(pid) is tuple
            and pid
            and type(pid[0]) is str
            and tuple(map(type, pid)) == types.get(pid[0])
        ):
            return _StandIn(self, pid[0])
        raise StoreError("its pickle refers to something else than devices and their code")

    def make(self, path: str, args: tuple[object, ...], kwargs: dict[str, object]) -> _StandIn:
        """What stands for the result of a call."""
        kind = path.rpartition(".")[2]
        if path in OF_NUMPY:
            return self._made_by_numpy(path, args, kwargs)
        if path in MEMBERS and not (len(args) == 1 and type(args[0]) is int and not kwargs):
            raise StoreError(f"its pickle looks up no member of {path}")
        if path in FILLED:
            if args or kwargs:
                raise StoreError(f"its pickle calls {path}, which no executable's does")
            return _Unfilled(self, kind, FILLED[path])
        self.accept((args, *kwargs.values()), path, frozenset(CALLED.get(path, "").split()))
        return _StandIn(self, kind)

    def _made_by_numpy(
        self, path: str, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> _StandIn:
        if path == "numpy.dtype" and len(args) == 3 and not kwargs:
            code = args[0]
            if isinstance(code, _StandIn) and code.kind == "scalar":
                code = getattr(sys.modules["ml_dtypes"], str(code.value))
            elif type(code) is not str or code not in {*NUMBERS, "O8"}:
                code = None
            if code is not None and _identical(args[1:], (False, True)):
                dtype: np.dtype[np.generic] = np.dtype(code)
                kind = "object" if dtype.hasobject else "dtype"
                return _DType(self, kind, value=dtype.__reduce__()[2])
        elif (
            len(args) == 3
            and _kind(args[0]) == "ndarray"
            and _identical(args[1:], ((0,), b"b"))
            and not kwargs
        ):
            return _Devices(self, "devices")
        raise StoreError(f"its pickle calls {path} as no executable's does")

    def accept(self, value: object, place: str, kinds: frozenset[str]) -> None:
        """Looks at everything in plain containers.

        Raises:
            StoreError: Something is neither plain nor of one of `kinds`.
        """
        for item in self._inside(value):
            kind = "bytes" if type(item) is bytes else _kind(item)
            if kind not in kinds and type(item) not in _PLAIN:
                raise StoreError(f"its pickle has {kind or type(item).__name__} in {place}")

    def _inside(self, value: object) -> Iterator[object]:
        waiting = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, list | set):
                self._lengths.append((item, len(item)))
            if isinstance(item, tuple | list | set | frozenset):
                waiting.extend(item)
            else:
                yield item

    def unchanged(self) -> None:
        """Makes sure that nothing was put into a list after it was looked at."""
        if any(len(container) != length for container, length in self._lengths):
            raise StoreError("its pickle changes what it has used")


CALLED = {
    "jax.P": "",
    "jax._src.core.ManualAxisType": "",
    "jax._src.core.ShapedArray": "dtype KeyTy ManualAxisType MemorySpace AutoLayoutSingleton "
    "_unpickle_named_sharding",
    "jax._src.interpreters.pxla.AllArgsInfo": "ShapedArray DebugInfo",
    "jax._src.layout.AutoLayoutSingleton": "",
    "jax._src.linear_util.DebugInfo": "",
    "jax._src.mesh.AbstractMesh": "AxisType AbstractDevice",
    "jax._src.mesh.Mesh": "devices AxisType",
    "jax._src.named_sharding._unpickle_named_sharding": "Mesh AbstractMesh P unpickle_pspec",
    "jax._src.partition_spec.unpickle_pspec": "",
    "jax._src.prng.PRNGImpl": "random",
    "jax._src.random.prng.PRNGImpl": "random",
    "jax._src.sharding_impls._unpickle_gspmd_sharding": "DeviceList OpSharding",
    "jax._src.sharding_impls._unpickle_single_device_sharding": "device",
}
"""What is called, and what may be in its arguments beside names and numbers."""

MEMBERS = frozenset({"jax._src.core.MemorySpace", "jax._src.mesh.AxisType"})
"""Enumerations: called with the number of a member."""

FILLED = {
    "jax._src.interpreters.pxla.UnloadedMeshExecutable": "exec client DeviceList ShapedArray "
    "Layout AutoLayoutSingleton AllArgsInfo _unpickle_named_sharding _unpickle_gspmd_sharding "
    "_unpickle_single_device_sharding",
    "jax._src.layout.Layout": "",
    "jax._src.mesh.AbstractDevice": "",
    "jax._src.prng.KeyTy": "PRNGImpl",
    "jax._src.random.prng.KeyTy": "PRNGImpl",
    "jax._src.stages.ArgInfo": "ShapedArray",
    "jaxlib._hlo.OpSharding": "bytes",
    "jaxlib._jax.DeviceList": "device",
    "jaxlib._jax.OpSharding": "bytes",
}
"""What is made empty and then filled once, and what may be in that beside names and numbers."""

OF_NUMPY = frozenset({"numpy.dtype", "numpy._core.multiarray._reconstruct"})
"""Makers of types and arrays, which could be told to read memory: they have rules of their own."""

_THREEFRY = "threefry_seed threefry_split threefry_random_bits threefry_fold_in"
_RBG = "_rbg_seed _rbg_split _rbg_random_bits _rbg_fold_in _unsafe_rbg_split _unsafe_rbg_fold_in"
_ML_DTYPES = """
bfloat16 int1 int2 int4 uint1 uint2 uint4 float4_e2m1fn float6_e2m3fn float6_e3m2fn float8_e3m4
float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
float8_e8m0fnu
"""
PASSED = {
    "numpy.ndarray": "ndarray",
    **{f"jax._src.prng.{name}": "random" for name in f"{_THREEFRY} {_RBG}".split()},
    **{f"jax._src.random.threefry2x32.{name}": "random" for name in _THREEFRY.split()},
    **{f"jax._src.random.rbg.{name}": "random" for name in _RBG.split()},
    **{f"ml_dtypes.{name}": "scalar" for name in _ML_DTYPES.split()},
}
"""Functions and classes that are passed on by a pickle, and never called."""

NUMBERS = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"}) | frozenset(
    {"f2", "f4", "f8", "c8", "c16"}
)
"""The types of numbers that are NumPy's own, by their codes."""
