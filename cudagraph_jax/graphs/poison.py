"""What the padding is filled with to see whether the real rows depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from cudagraph_jax.program.call import Call
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.axes import LeafAxes
from cudagraph_jax.shapes.padding import EDGE, UNCHOSEN, Array, PadValue

Poison = Mapping[int, PadValue]
"""The pad value of each leaf, by its index, that is not padded as usual."""


class Poisonable(NamedTuple):
    """The arrays whose padding must not matter, by their index among a call's leaves.

    Attributes:
        data: Arrays that can be no masks.
        doubtful: Arrays of nothing but 0 and 1, which may be data or a mask.
    """

    data: dict[int, Array]
    doubtful: dict[int, Array]


def poisonable(program: Program, call: Call) -> Poisonable:
    """What of `call` may be padded with anything.

    Not so bools, and numbers that look like a mask (ones, then zeros, along the sequence): their
    padding says what is padding. Nor arrays whose pad value was chosen, be it 0, so that the
    function ignores it.
    """
    found = Poisonable({}, {})
    for index, (leaf, axes, usual) in enumerate(
        zip(call.leaves, call.axes, program.pad_values, strict=False)
    ):
        if axes.passes_through or not (usual is UNCHOSEN or usual == EDGE):
            continue
        array = np.asarray(leaf)
        if not array.size or array.dtype == np.bool_ or _looks_like_mask(array, axes):
            continue
        is_doubtful = np.all((array == 0) | (array == 1))
        (found.doubtful if is_doubtful else found.data)[index] = array
    return found


def poison(data: Mapping[int, Array], floating: float, *, largest: bool) -> dict[int, PadValue]:
    """Padding of `floating`, or of an end of the range of integers that are surely valid.

    Between 0 and their real values, integers are what the function may index with.
    """
    values: dict[int, PadValue] = {}
    for index, array in data.items():
        if jnp.issubdtype(array.dtype, np.inexact):
            limits = jnp.finfo(array.dtype)  # type: ignore[no-untyped-call]
            values[index] = float(np.clip(floating, float(limits.min), float(limits.max)))
        elif largest:
            values[index] = max(0, int(array.max()))
        else:
            values[index] = min(0, int(array.min()))
    return values


def _looks_like_mask(array: Array, axes: LeafAxes) -> bool:
    if axes.seq is None:
        return False
    is_one = np.moveaxis(array, axes.seq, -1) == 1
    ends_in_zeros = np.all(is_one[..., :-1] | ~is_one[..., 1:])
    is_binary = np.all((array == 0) | (array == 1))
    return bool(is_binary and ends_in_zeros and np.any(is_one) and not np.all(is_one))
