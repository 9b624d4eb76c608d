"""`bucket_jit`: from a plain function to a `BucketedFunction`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, ParamSpec, TypedDict, TypeVar, Unpack, overload

import jax

from cudagraph_jax._base.checks import names_nearest, nearest, require_arrays_from
from cudagraph_jax.config import CUDAGraphConfig, checked_config
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.dispatch.manager import CUDAGraphManager
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.program.binding import Binder
from cudagraph_jax.program.call import Mask, Target
from cudagraph_jax.program.fingerprint import Fingerprint, fingerprint_of
from cudagraph_jax.program.outputs import UNPADS
from cudagraph_jax.program.single_input import function_name
from cudagraph_jax.shapes.axes import AxisPattern
from cudagraph_jax.shapes.padding import UNCHOSEN
from cudagraph_jax.shapes.pytrees import PyTree, is_declaration
from cudagraph_jax.xla.shardings import divided_grid

if TYPE_CHECKING:
    from cudagraph_jax.store import GraphStore

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class BucketOptions(TypedDict, total=False):
    """Options of `bucket_jit` that say nothing about the signature of what it makes."""

    out_axes: PyTree
    config: CUDAGraphConfig | None
    manager: CUDAGraphManager | None
    store: GraphStore | str | os.PathLike[str] | None
    fingerprint: str | None
    pad_values: PyTree
    pad_side: PyTree
    in_shardings: PyTree
    unpad: PyTree
    donate_argnums: int | Iterable[int]
    static_argnames: str | Iterable[str]
    name: str | None


# Callers do not pass the mask, so that the signature is not theirs.
@overload
def bucket_jit(
    fn: Callable[..., R],
    *,
    in_axes: PyTree,
    mask_argname: str | Mapping[str, str],
    **options: Unpack[BucketOptions],
) -> BucketedFunction[..., R]: ...


@overload
def bucket_jit(
    fn: None = None,
    *,
    in_axes: PyTree,
    mask_argname: str | Mapping[str, str],
    **options: Unpack[BucketOptions],
) -> Callable[[Callable[..., R]], BucketedFunction[..., R]]: ...


@overload
def bucket_jit(
    fn: Callable[P, R],
    *,
    in_axes: PyTree,
    mask_argname: None = ...,
    **options: Unpack[BucketOptions],
) -> BucketedFunction[P, R]: ...


@overload
def bucket_jit(
    fn: None = None,
    *,
    in_axes: PyTree,
    mask_argname: None = ...,
    **options: Unpack[BucketOptions],
) -> Callable[[Callable[P, R]], BucketedFunction[P, R]]: ...


@names_nearest
def bucket_jit(
    fn: Callable[P, R] | None = None,
    *,
    in_axes: PyTree,
    out_axes: PyTree = None,
    config: CUDAGraphConfig | None = None,
    manager: CUDAGraphManager | None = None,
    store: GraphStore | str | os.PathLike[str] | None = None,
    fingerprint: str | None = None,
    pad_values: PyTree = UNCHOSEN,
    pad_side: PyTree = "right",
    in_shardings: PyTree = None,
    mask_argname: str | Mapping[str, str] | None = None,
    unpad: PyTree = "host",
    donate_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    name: str | None = None,
) -> BucketedFunction[P, R] | Callable[[Callable[P, R]], BucketedFunction[P, R]]:
    """Makes a function of ragged sizes compile once per bucket instead of once per size.

    Works as a decorator with options, and as a function. An input that needs padding is padded on
    the host, in NumPy, so that padding never compiles: a NumPy array costs microseconds; a JAX
    array on an accelerator is first copied to the host, and the padded one back, which waits for
    the computation that makes it. Arrays that already have a bucket's shape are passed as they are.

    Args:
        fn: A pure JAX function.
        in_axes: A pytree prefix of its positional arguments, as in `jax.vmap`. A leaf is None
            (passed through, such as parameters), or names the dimensions of the arrays below it in
            order: `"batch"`, `"seq"`, `"_"` (any one dimension), `"..."` (the rest). One string
            alone stands for every argument that is no number; numbers are passed through.
        out_axes: The same for the outputs; None: found by tracing at two sizes of each axis.
        config: Buckets, limits and policies; the default if None.
        manager: The manager to share with other functions, instead of `config`.
        store: A `GraphStore`, or its directory: executables are loaded from there, and put there
            when they were compiled, so that a restarted process is warm without compiling.
        fingerprint: What this version of `fn`, of all that it calls and of the constants that it
            closes over is called, such as `"model-v3"`. What a store has under it is loaded
            without tracing `fn`; change it whenever any of that changes, or old answers come back.
            Without a store it does nothing.
        pad_values: A pytree prefix of the positional arguments: what padding is filled with, or
            `"edge"` to repeat the last real row. A value that is chosen, also 0, says that `fn`
            ignores it: `debug_mode` tries no other padding for that array. `"any"` says that it
            ignores whatever is there, NaN included: then a `Padded` is never filled anew.
        pad_side: A pytree prefix of the positional arguments: `"right"`, or `"left"` where the
            padding of all axes but the batch stands in front, as for text generation. Outputs are
            cut on the same side.
        in_shardings: A pytree prefix of the positional arguments: a `jax.sharding.NamedSharding`,
            all over one mesh, or None, where an array is wherever it comes. What was padded, comes
            in NumPy or lies elsewhere is put there, by way of the host. Sizes of the grid are
            multiples of what the mesh cuts their axis into; the default ones are rounded up to it.
        mask_argname: A keyword of `fn` that gets `bool[batch, seq]`, True where an element is
            real: of the axes that `in_axes` names, so `bool[batch]` for rows alone. Several by a
            mapping, each of the axes that it names:
            `{"src_mask": "batch src", "row_mask": "batch"}`. Callers do not pass them.
        unpad: A pytree prefix of the outputs. `"host"`: read-only NumPy arrays, trimmed: views, or
            copies where a view would keep much more than itself; compiles nothing. `"device"`: JAX
            arrays, trimmed; compiles a slice for every new size. `"none"`: the JAX arrays at the
            bucket's size. `"padded"`: those with their real sizes, as a `Padded`, which another
            bucketed function takes; waits for nothing, compiles nothing.
        donate_argnums: Positions of the arguments whose buffers the outputs may take over.
        static_argnames: Arguments that select a program of their own by their value.
        name: What reports, logs and profiles call it; the function's own name if None.

    Raises:
        ConfigError: An option that is not valid, or does not fit the function, or a size of the
            grid that the mesh does not divide; of pytrees it is known at the first call.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> @bucket_jit(in_axes=(None, "batch seq"))
        ... def scores(weights, tokens):
        ...     return jnp.sum(weights[tokens], axis=1)
        >>> scores(jnp.arange(10.0), np.array([[1, 2, 3]], np.int32))
        array([6.], dtype=float32)
    """

    def make(function: Callable[P, R]) -> BucketedFunction[P, R]:
        require_arrays_from("fn", function)
        called = function_name(function) if name is None else str(name)
        masks = _masks(mask_argname)
        binder = Binder(
            function,
            name=called,
            in_axes=in_axes,
            pad_values=pad_values,
            pad_side=pad_side,
            in_shardings=in_shardings,
            static_argnames=_listed(static_argnames, str, "static_argnames"),
            donate_argnums=_listed(donate_argnums, int, "donate_argnums"),
            masks=[mask.name for mask in masks],
        )
        target = Target(
            function,
            called,
            unpad=jax.tree.map(_unpad, unpad, is_leaf=is_declaration),
            out_axes=jax.tree.map(_out_axes, out_axes, is_leaf=is_declaration),
            donate_argnums=binder.donate_argnums,
            masks=masks,
            fingerprint=_fingerprint(function, fingerprint),
        )
        shared = _manager(config, manager, store)
        _check_axes(binder.in_axes, target, shared.config)
        return BucketedFunction(function, binder=binder, target=target, manager=shared)

    return make if fn is None else make(fn)


def _masks(given: object) -> tuple[Mask, ...]:
    """The masks that a function takes: one over all axes, or several over those that they name."""
    if given is None:
        return ()
    if isinstance(given, str):
        return (Mask(given),)
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"mask_argname={given!r}: name the keyword that takes the mask, or several with their "
            'axes, as {"src_mask": "batch src", "row_mask": "batch"}'
        )
    masks = []
    for name, axes in given.items():
        option = f"mask_argname[{name!r}]"
        pattern = AxisPattern.parse(axes, option=option) if isinstance(axes, str) else None
        if pattern is None or not pattern.is_sizes or not isinstance(name, str):
            raise ConfigError(
                f"mask_argname has {name!r}: {axes!r}: give the axes of the mask, as "
                f'{{{str(name)!r}: "batch seq"}}'
            )
        names = tuple(length.axis for length in pattern.lengths)
        if names.count("batch") > 1:
            raise ConfigError(
                f"{option}={axes!r} has the batch twice, but a mask has one row for each of it: "
                "name it once"
            )
        masks.append(Mask(name, names))
    return tuple(masks)


def _check_axes(in_axes: PyTree, target: Target, config: CUDAGraphConfig) -> None:
    """Raises unless every axis has sizes, and those of outputs and masks are an argument's.

    Raises:
        ConfigError: An axis has not, or is carried by no argument.
    """
    known = ["batch", "seq", *config.capture_axes]
    named = [(f"in_axes={leaf!r}", leaf) for leaf in jax.tree.leaves(in_axes)]
    carried = {length.axis for _, leaf in named for length in leaf.lengths if length.tells_size}
    for leaf in jax.tree.leaves(target.out_axes):
        named.append((f"out_axes={leaf!r}", AxisPattern.parse(leaf)))
    for mask in target.masks:
        text = " ".join(mask.axes or ())
        named.append((f"mask_argname={{{mask.name!r}: {text!r}}}", AxisPattern.parse(text)))
    for where, pattern in named:
        for length in pattern.lengths:
            if length.axis not in known:
                raise ConfigError(
                    f"{where} names {length.axis!r}, which has no sizes: add capture_axes="
                    f"{{{length.axis!r}: (…)}} to the config; {nearest(length.axis, known)}"
                )
            if length.axis not in carried:
                raise ConfigError(
                    f"{where} names {length}, but no argument carries {length.axis!r} itself, or a "
                    f"sum or multiple that tells its size (as {length.axis}+1 does, and "
                    f"{length.axis}//2 does not): name it in in_axes"
                )


def _manager(
    config: CUDAGraphConfig | None,
    manager: CUDAGraphManager | None,
    store: GraphStore | str | os.PathLike[str] | None,
) -> CUDAGraphManager:
    if store is not None and config is not None and config.store is not None:
        raise ConfigError(f"store={store!r} and the config's {config.store!r}: give one of the two")
    if manager is None:
        return CUDAGraphManager(config, store=_opened(store))
    if not isinstance(manager, CUDAGraphManager):
        raise ConfigError(f"manager={manager!r:.80} is no CUDAGraphManager: give one, or a config")
    if config is not None and manager.config not in (
        config,
        divided_grid(checked_config(config), manager.multiples),
    ):
        raise ConfigError(
            f"config={config} is not the manager's, {manager.config}: give one of the two"
        )
    if store is not None and store is not manager.store:
        raise ConfigError(
            f"store={store!r:.80} is not the manager's, {manager.store!r}: give it to the manager"
        )
    return manager


def _opened(store: GraphStore | str | os.PathLike[str] | None) -> GraphStore | None:
    if store is None:
        return None
    # Here, because most processes keep nothing.
    from cudagraph_jax.store import GraphStore

    return store if isinstance(store, GraphStore) else GraphStore(store)


def _fingerprint(function: Callable[..., object], given: object) -> Fingerprint | None:
    if given is None:
        return None
    if not isinstance(given, str) or not given:
        raise ConfigError(
            f'fingerprint={given!r:.80} is no text: name the version of the function, as "model-v3"'
        )
    return fingerprint_of(function, given)


def _listed(given: T | Iterable[T], kind: type[T], option: str) -> tuple[T, ...]:
    """One value or several, as a tuple."""
    listed = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else given
    values = tuple(listed)
    for value in values:
        if not isinstance(value, kind):
            raise ConfigError(f"{option} has {value!r}: give {kind.__name__} values")
    return values


def _unpad(mode: object) -> object:
    if not isinstance(mode, str) or mode not in ("host", "device", "none", "padded"):
        raise ConfigError(f"unpad={mode!r:.80} is unknown: use {UNPADS}")
    return mode


def _out_axes(spec: object) -> object:
    if isinstance(spec, str):
        AxisPattern.parse(spec, option="out_axes")
    elif spec is not None:
        raise ConfigError(
            f'out_axes has the entry {spec!r}: use None, or names such as "batch seq ..."'
        )
    return spec
