"""Compiled functions as bytes: the only door to `jax.experimental.serialize_executable`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled

from cudagraph_jax.errors import StoreError
from cudagraph_jax.xla import unpickle


def dump(compiled: Compiled) -> bytes:
    """An executable as bytes, for this version of JAX and this kind of device.

    Raises:
        StoreError: It cannot be written, or its pickle names what `load` would refuse.
    """
    try:
        data: bytes = serialize_executable.serialize(compiled)[0]
    except Exception as error:
        raise StoreError(f"JAX cannot write it: {unpickle.reason(error)}") from error
    unpickle.check(data)
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
    unpickle.check(data)
    try:
        compiled: Compiled = serialize_executable.deserialize_and_load(
            data, inputs, outputs, backend=devices[0].platform, execution_devices=list(devices)
        )
    except Exception as error:
        raise StoreError(f"JAX cannot load it: {unpickle.reason(error)}") from error
    return compiled
