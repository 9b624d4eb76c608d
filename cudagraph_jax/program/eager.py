"""Calls without a bucket: the plain function, with outputs as the caller asked for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from cudagraph_jax._base.fork import use_jax
from cudagraph_jax.errors import DistributedError
from cudagraph_jax.program.call import (
    Call,
    Declarations,
    Target,
    fits_integers,
    is_key,
    spans_processes,
    traced_sizes,
)
from cudagraph_jax.program.outputs import WITH_PADDING
from cudagraph_jax.program.padded import Padded, is_padded, real_part
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import read_only
from cudagraph_jax.shapes.pytrees import PyTree, broadcast_prefix
from cudagraph_jax.xla.settings import ASKED, mesh_of
from cudagraph_jax.xla.shardings import dividing
from cudagraph_jax.xla.stages import tracing_refusals


def run_eagerly(call: Call, *, target: Target | None = None, is_shared: bool = False) -> PyTree:
    """The plain function's answer; NumPy arrays where `unpad="host"`.

    NumPy inputs become JAX arrays first, since the function is written for those.

    Args:
        call: The call.
        target: What is asked of its outputs; as the call has it, if None.
        is_shared: Whether it is known to span several processes, whatever its arrays say.

    Raises:
        DistributedError: It spans several processes.
        UnexpectedCompileError: An operation had to be compiled inside `no_compiles()`.
    """
    use_jax()
    if is_shared or spans_processes(call.variant.leaves):
        raise DistributedError(
            f"{call.target.name} at {call.sizes} spans several processes and would run eagerly, "
            "which another one may not: warm its bucket up"
        )
    target = call.target if target is None else target
    # As under `jit`, where arrays that are nowhere on purpose are on all devices of the mesh.
    mesh = mesh_of(call.variant.settings)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    placed = [leaf.sharding or everywhere for leaf in call.variant.leaves]
    leaves = list(map(_on_device, call.leaves, placed))
    args, kwargs = jax.tree.unflatten(call.variant.structure, leaves)
    masks = jax.device_put(_full_masks(target, call.carried, call.sizes), everywhere)
    what = f"an operation of {target.name}, which runs eagerly,"
    with tracing_refusals(what), _running_plainly():
        result = _called(call, args, {**kwargs, **masks})
    # Of an argument that is handed on: within a bucket that is an array.
    result = jax.tree.map(real_part, result, is_leaf=is_padded)
    if target.unpad == "host":
        return jax.tree.map(_on_host, result)
    modes = broadcast_prefix(target.unpad, result, name="unpad")
    leaves, structure = jax.tree.flatten(result)
    given = {id(leaf) for leaf in call.leaves}
    handed_out = [
        _handed_out(leaf, mode, is_given=id(leaf) in given)
        for leaf, mode in zip(leaves, modes, strict=True)
    ]
    return jax.tree.unflatten(structure, handed_out)


@contextmanager
def _running_plainly() -> Iterator[None]:
    """Has the bucketed functions that a plain one calls in this thread hand out no padding.

    As where it is traced: there they get tracers, and are simply the functions.
    """
    thread = get_ident()
    is_first = thread not in ASKED
    try:
        ASKED.add(thread)
        yield
    finally:
        if is_first:
            ASKED.discard(thread)


def is_plain(unpad: PyTree) -> bool:
    """Whether a function runs eagerly in this thread, so that none that it calls gives padding.

    Args:
        unpad: What is asked of the outputs of one that it may call.
    """
    return get_ident() in ASKED and not WITH_PADDING.isdisjoint(jax.tree.leaves(unpad))


def _called(call: Call, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> PyTree:
    function, wholes, variant = call.target.function, call.target.wholes, call.variant
    if variant not in wholes:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            # A class that JAX does not show.
            if type(error).__name__ != "IndivisibleError":
                raise
    # `with_sharding_constraint` takes no uneven parts but within a trace, where they are no arrays.
    # From the first time on that is known of the function.
    return wholes.of(variant, call.sizes, function)(*args, **kwargs)


def _handed_out(leaf: PyTree, unpad: object, *, is_given: bool) -> PyTree:
    if unpad == "host":
        return _on_host(leaf)
    if is_given and isinstance(leaf, jax.Array):
        # As under `jit` another array, so that who gives it away keeps their own.
        leaf = jax.device_put(leaf, may_alias=False)
    # A number of Python's gives way to other dtypes, as it does where a bucket gives it.
    leaf = jax.device_put(leaf) if _is_number(leaf) else _on_device(leaf, None)
    is_concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return Padded(leaf, leaf.shape) if unpad == "padded" and is_concrete else leaf


def run_traced(
    target: Target, args: tuple[PyTree, ...], kwargs: Mapping[str, PyTree], declared: Declarations
) -> PyTree:
    """The plain function of tracers, with the masks of real elements that it takes."""
    if not target.masks:
        return target.function(*args, **kwargs)
    masks = _full_masks(target, *traced_sizes(args, declared))
    return target.function(*args, **kwargs, **masks)


def _full_masks(target: Target, carried: Sequence[str], sizes: Bucket) -> dict[str, PyTree]:
    shapes = {mask.name: mask.shape(carried, sizes) for mask in target.masks}
    # Of sizes that are symbols, as under `jax.export`, NumPy makes no array.
    return {
        name: (np if all(isinstance(size, int) for size in shape) else jnp).ones(shape, np.bool_)
        for name, shape in shapes.items()
    }


def _on_host(leaf: PyTree) -> PyTree:
    # Constants that are computed on while another function is traced become part of it.
    if isinstance(leaf, jax.core.Tracer):
        return leaf
    if _is_number(leaf) or (isinstance(leaf, np.ndarray) and _is_numeric(leaf.dtype)):
        # Of 64 bits while x64 is off, NumPy's as well as Python's: of JAX's dtype, as in a bucket.
        dtype = np.result_type(getattr(leaf, "dtype", type(leaf)))
        leaf = np.asarray(leaf, jax.dtypes.canonicalize_dtype(dtype))
    # What is no array is the caller's as it is: text, objects, keys, which NumPy cannot hold.
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic) and not is_key(leaf)
    return read_only(np.asarray(leaf)) if is_array else leaf


def _is_number(leaf: PyTree) -> bool:
    """Whether it is a number that JAX can hold, and no array."""
    if isinstance(leaf, np.generic):
        return _is_numeric(leaf.dtype)
    return isinstance(leaf, bool | int | float | complex) and fits_integers(leaf)


def _is_numeric(dtype: np.dtype[np.generic]) -> bool:
    return dtype == np.bool_ or bool(jnp.issubdtype(dtype, np.number))


def _on_device(leaf: PyTree, sharding: Sharding | None) -> PyTree:
    leaf = real_part(leaf)
    if isinstance(leaf, np.ndarray):
        # On a CPU JAX would go on in the memory of the caller, who may write to it later.
        leaf = np.array(leaf)
    elif sharding is None or not isinstance(leaf, jax.Array):
        return leaf
    return jax.device_put(leaf, dividing(sharding, leaf.shape))
