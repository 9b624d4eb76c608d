"""The strategy for the arguments of a bucketed function."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from hypothesis import strategies as st

from cudagraph_jax._base.checks import names_nearest
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.program.call import is_number
from cudagraph_jax.shapes.axes import PASS_THROUGH, AxisPattern, least_size
from cudagraph_jax.shapes.pad_sides import padded_on_sides
from cudagraph_jax.shapes.pytrees import PyTree, broadcast_prefix, is_declaration, leaf_names
from cudagraph_jax.testing.grids import axes_of, limits_of, sizes_below
from cudagraph_jax.testing.values import ArraySpec, draw_arrays, is_values

_SMALL = (4, 8)
_ANY_SIZE = 3


def small_grid(in_axes: PyTree) -> CUDAGraphConfig:
    """Sizes small enough for hundreds of examples, with each kind of padding."""
    texts = [leaf for leaf in jax.tree.leaves(in_axes) if isinstance(leaf, str)]
    names = {length.axis for text in texts for length in AxisPattern.parse(text).lengths}
    return CUDAGraphConfig(
        capture_sizes=(1, 2, 4),
        capture_seq_lens=_SMALL,
        capture_axes=dict.fromkeys(names - {"batch", "seq"}, _SMALL),
    )


@names_nearest
def inputs(
    in_axes: PyTree,
    *,
    pad_side: PyTree = "right",
    example: tuple[PyTree, ...] | None = None,
    dtypes: PyTree = None,
    values: PyTree = None,
    config: CUDAGraphConfig | None = None,
    max_batch_size: int | None = None,
    max_seq_len: int | None = None,
    max_sizes: Mapping[str, int] | None = None,
) -> st.SearchStrategy[tuple[PyTree, ...]]:
    """Positional arguments for a function with these `in_axes`, at sizes that `config` allows.

    Sizes are often at an edge of the grid; see `sizes`. Lengths that follow from one, such as
    `seq+1`, are those of the call, and sizes at which one would be 0 are not drawn. Arrays are
    NumPy arrays.

    Args:
        in_axes: As for `bucket_jit`: a pytree prefix of the positional arguments; one string is
            one array where there is no example, since no function says how many there are.
        pad_side: As for `bucket_jit`: on the left a `"mask"` begins with its zeros.
        example: Positional arguments of any sizes, arrays or `jax.ShapeDtypeStruct`: gives the
            pytrees, the dtypes and the other dimensions. What is passed through is given as it
            is. If None, each entry of `in_axes` is one array of float32, with three for `_` and
            one dimension of three for `...`.
        dtypes: A pytree prefix of the arguments: other dtypes than those; None: the same.
        values: A pytree prefix of the arguments. None: normally distributed numbers, integers
            from 0 to 9, any bools. `(low, high)`: numbers from one to the other, both included.
            `"mask"`: ones, then zeros, along the last axis that is not the batch; zeros, then
            ones, where that is padded on the left. `"lengths"`: integers from 1 to seq_len.
            `"positions"`: integers from 0 to seq_len - 1. `"lengths src"` and `"positions src"`:
            the same of the axis `src`. A strategy: its values are the elements.
        config: The grid, and the limits of the sizes; a small one if None.
        max_batch_size: The largest batch to draw, where that is less than the config's.
        max_seq_len: The largest sequence length to draw, where that is less than the config's.
        max_sizes: The same by the name of the axis: `{"height": 32}`.

    Raises:
        ConfigError: What is given does not fit together.

    Example:
        >>> from hypothesis import find
        >>> drawn = inputs(("batch seq",), dtypes="int32", values=(1, 99))
        >>> find(drawn, lambda args: args[0].shape == (2, 3))[0].dtype
        dtype('int32')
    """
    args = _arrays_of(in_axes) if example is None else tuple(example)
    patterns = padded_on_sides(jax.tree.map(AxisPattern.parse, in_axes), pad_side)
    specs = _specs(patterns, args, dtypes, values)
    leaves, structure = jax.tree.flatten(args)
    drawn = [index for index, spec in enumerate(specs) if spec is not None]
    chosen = tuple(spec for spec in specs if spec is not None)
    config = small_grid(in_axes) if config is None else config
    for spec in chosen:
        spec.check_axis(axes_of(config))
    # Others would only take their part of what max_bucket_elements allows.
    unused = set(axes_of(config)).difference(*(spec.uses for spec in chosen))
    given = limits_of(config, max_batch_size, max_seq_len, max_sizes)
    limits = {**given, **dict.fromkeys(unused, 1)}
    least = partial(least_size, [spec.axes for spec in chosen])
    any_size = sizes_below(config, limits, least=least)

    @st.composite
    def filled(draw: st.DrawFn) -> tuple[PyTree, ...]:
        size = draw(any_size)
        whole = list(leaves)
        for index, array in zip(drawn, draw_arrays(draw, chosen, size), strict=True):
            whole[index] = array
        made: tuple[PyTree, ...] = jax.tree.unflatten(structure, whole)
        return made

    return filled()


def _arrays_of(in_axes: PyTree) -> tuple[PyTree, ...]:
    """One array for each entry of `in_axes`, of which the declared dimensions are known."""
    entries = in_axes if isinstance(in_axes, (tuple, list)) else (in_axes,)
    return tuple(jax.tree.map(_array_of, entry, is_leaf=is_declaration) for entry in entries)


def _array_of(text: object) -> jax.ShapeDtypeStruct:
    if not isinstance(text, str):
        raise ConfigError(
            f"in_axes has the entry {text!r}, whose argument is passed through: "
            "give example=, with all positional arguments"
        )
    pattern = AxisPattern.parse(text)
    others = 0 if pattern.after is None else 1
    return jax.ShapeDtypeStruct((_ANY_SIZE,) * (pattern.min_ndim + others), np.float32)


def _specs(
    in_axes: PyTree, args: tuple[PyTree, ...], dtypes: PyTree, values: PyTree
) -> list[ArraySpec | None]:
    """What to draw for each leaf of `args`, of which `in_axes` has patterns; None: itself."""
    names = leaf_names([f"argument {index}" for index in range(len(args))], args)
    patterns = _spread(in_axes, args, "in_axes", is_declaration)
    kinds = _spread(dtypes, args, "dtypes", is_declaration)
    fills = _spread(values, args, "values", is_values)
    specs: list[ArraySpec | None] = []
    for name, leaf, pattern, kind, fill in zip(
        names, jax.tree.leaves(args), patterns, kinds, fills, strict=True
    ):
        is_spared = isinstance(in_axes, AxisPattern) and is_number(leaf)
        if is_spared or (pattern is None and not isinstance(leaf, jax.ShapeDtypeStruct)):
            specs.append(None)
            continue
        shape = getattr(leaf, "shape", None)
        if shape is None:
            raise ConfigError(f"{name}={leaf!r:.60} is no array: make it one, numpy.asarray does")
        axes = PASS_THROUGH if pattern is None else pattern.resolve(len(shape), name=name)
        dtype = leaf.dtype if kind is None else jax.dtypes.canonicalize_dtype(kind)
        specs.append(ArraySpec(name, tuple(shape), axes, dtype, fill))
    return specs


def _spread(prefix: PyTree, args: tuple[PyTree, ...], name: str, is_leaf: Any) -> list[Any]:
    """The entry of a pytree prefix for each leaf of the arguments."""
    if is_leaf(prefix) or not isinstance(prefix, (tuple, list)):
        prefix = (prefix,) * len(args)
    if len(prefix) != len(args):
        raise ConfigError(
            f"{name} has {len(prefix)} entries for {len(args)} arguments: give one for each"
        )
    return broadcast_prefix(tuple(prefix), args, name=name, leaf=is_leaf)
