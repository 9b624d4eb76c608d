"""On which side arguments are padded: a pytree prefix of the axes that they carry."""

from __future__ import annotations

import jax

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.shapes.axes import AxisPattern, Length
from cudagraph_jax.shapes.pytrees import PyTree, broadcast_prefix, is_declaration


def _side(side: object) -> str:
    if side is None:
        return "right"
    if isinstance(side, str) and side in ("right", "left"):
        return side
    raise ConfigError(f'pad_side has {side!r:.80}: use "right" or "left"')


def padded_on_sides(in_axes: PyTree, pad_side: PyTree) -> PyTree:
    """`in_axes`, whose patterns know the side of their padding.

    Args:
        in_axes: A pytree prefix of the arguments: patterns or None.
        pad_side: A pytree prefix of `"right"` and `"left"`; None is the right.

    Raises:
        ConfigError: `pad_side` does not fit them, or would pad one axis on both sides.
    """
    sides = jax.tree.map(_side, pad_side, is_leaf=is_declaration)
    if isinstance(sides, str):
        if sides == "left":
            _check_lengths(in_axes)
            in_axes = jax.tree.map(AxisPattern.padded_left, in_axes)
    elif (
        isinstance(in_axes, tuple | list)
        and isinstance(sides, tuple | list)
        and len(sides) <= len(in_axes)
    ):
        filled = [*sides, *["right"] * (len(in_axes) - len(sides))]
        in_axes = tuple(map(_sided_entry, in_axes, filled))
    else:
        raise ConfigError(
            f"pad_side={sides!r} has not the structure of in_axes={in_axes!r}: give one side for "
            "all arguments, or one for each"
        )
    _check_one_side(in_axes)
    return in_axes


def _check_one_side(in_axes: PyTree) -> None:
    seen: dict[str, tuple[AxisPattern, Length]] = {}
    for pattern in jax.tree.leaves(in_axes):
        for length in pattern.lengths:
            other, known = seen.setdefault(length.axis, (pattern, length))
            if known.left != length.left:
                raise ConfigError(
                    f"pad_side pads {length.axis!r} on the left in one of {other!r} and "
                    f"{pattern!r}, and on the right in the other: give both one side"
                )


def _check_lengths(axes: PyTree) -> None:
    """Raises where there is nothing that could be padded on the left."""
    patterns = jax.tree.leaves(axes)
    if not any(length.axis != "batch" for pattern in patterns for length in pattern.lengths):
        raise ConfigError(
            f'pad_side has "left" for {axes!r}, which is padded along the batch alone, whose rows '
            'are added at its end: give "right" for it'
        )


def _sided_entry(axes: PyTree, sides: PyTree) -> PyTree:
    """The axes of one argument, padded on these sides."""
    if not isinstance(sides, str):
        if isinstance(axes, AxisPattern):
            return jax.tree.map(lambda one: _sided_entry(axes, one), sides)
        each = broadcast_prefix(sides, axes, name="pad_side")
        leaves, structure = jax.tree.flatten(axes)
        return jax.tree.unflatten(structure, list(map(_sided_entry, leaves, each)))
    if sides == "right":
        return axes
    _check_lengths(axes)
    return jax.tree.map(AxisPattern.padded_left, axes)
