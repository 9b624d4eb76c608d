"""Compiled functions as bytes: the only door to `jax.experimental.serialize_executable`."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence

import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled

from cudagraph_jax.errors import StoreError

_JAX_NAMES = """
P PartitionSpec NamedSharding SingleDeviceSharding GSPMDSharding PositionalSharding
_unpickle_named_sharding _unpickle_single_device_sharding _unpickle_gspmd_sharding
Mesh AbstractMesh AbstractDevice AxisType Layout Format AutoLayoutSingleton
ShapedArray ShapeDtypeStruct MemorySpace ManualAxisType ArgInfo AllArgsInfo DebugInfo
UnloadedMeshExecutable UnspecifiedValue
KeyTy PRNGImpl threefry_seed threefry_split threefry_random_bits threefry_fold_in
_rbg_seed _rbg_split _rbg_fold_in _rbg_random_bits _unsafe_rbg_split _unsafe_rbg_fold_in
"""
_ML_DTYPES_NAMES = """
bfloat16 int1 int2 int4 uint1 uint2 uint4 float4_e2m1fn float6_e2m3fn float6_e3m2fn float8_e3m4
float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
float8_e8m0fnu
"""
_ALLOWED = {
    "jax": frozenset(_JAX_NAMES.split()),
    "jaxlib": frozenset({"DeviceList", "HloSharding"}),
    "numpy": frozenset({"dtype", "ndarray", "_reconstruct"}),
    "ml_dtypes": frozenset(_ML_DTYPES_NAMES.split()),
}
"""What an executable's pickle may name, by the package that it comes from: its descriptions of
arrays, devices and random keys. None of these runs what it is given."""


def dump(compiled: Compiled) -> bytes:
    """An executable as bytes, for this version of JAX and this kind of device.

    Raises:
        StoreError: It cannot be written, or could not be read back.
    """
    try:
        data: bytes = serialize_executable.serialize(compiled)[0]
    except Exception as error:
        raise StoreError(f"JAX cannot write it: {_reason(error)}") from error
    _check_names(data)
    return data


def load(
    data: bytes,
    *,
    inputs: jax.tree_util.PyTreeDef,
    outputs: jax.tree_util.PyTreeDef,
    devices: Sequence[jax.Device],
) -> Compiled:
    """The executable that `dump` wrote.

    It is native code, so the bytes must be known to come from `dump`; that nothing but an
    executable's own classes is unpickled is a second line of defence.

    Args:
        data: What `dump` gave.
        inputs: The pytree of `(args, kwargs)`.
        outputs: The pytree of the outputs.
        devices: Those it was compiled for, in their order. JAX would take all of the backend.

    Raises:
        StoreError: It names something that no executable needs, or cannot be loaded here.
    """
    _check_names(data)
    try:
        compiled: Compiled = serialize_executable.deserialize_and_load(
            data, inputs, outputs, backend=devices[0].platform, execution_devices=list(devices)
        )
    except Exception as error:
        raise StoreError(f"JAX cannot load it: {_reason(error)}") from error
    return compiled


def _check_names(data: bytes) -> None:
    """Goes through a pickle as its reader will, without making anything that it names."""
    try:
        _Checker(io.BytesIO(data)).load()
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"its pickle cannot be followed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


class _Inert:
    """Stands for whatever a pickle makes, and does nothing with what it is given."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Checker(pickle.Unpickler):
    """Follows the same instructions as JAX's unpickler, which asks for the same names."""

    def find_class(self, module: str, name: str) -> type[_Inert]:
        if name not in _ALLOWED.get(module.partition(".")[0], ()):
            raise StoreError(f"its pickle names {module}.{name}, which no executable needs")
        return _Inert

    def persistent_load(self, pid: object) -> _Inert:
        return _Inert()
