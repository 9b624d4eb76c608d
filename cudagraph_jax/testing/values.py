"""What arrays are filled with: values of one array for a call of any size."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from cudagraph_jax._base.checks import nearest
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.shapes.axes import LeafAxes
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import Array

# Larger ones may be no valid index of a table.
_INTEGERS = (0, 9)
_WORDS = ("mask", "lengths", "positions")
_OF_SIZE = re.compile(r"(lengths|positions)(?: (\w+))?")
_SEEDS = st.integers(0, 2**32 - 1)
_SIGNS = st.sampled_from((0, 1, -1))


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a call.

    Attributes:
        name: What errors call it.
        shape: Its shape; the dimensions of `axes` count for nothing.
        axes: Which dimensions follow a size.
        dtype: Its dtype.
        values: None, `"mask"`, `"lengths"`, `"positions"`, the last two with the name of another
            axis than the sequence behind them or not, a range (low, high), or a strategy for an
            element.

    Raises:
        ConfigError: `values` is none of these, or does not fit the dtype or the axes.
    """

    name: str
    shape: tuple[int, ...]
    axes: LeafAxes
    dtype: np.dtype[Any]
    values: Any = None

    def __post_init__(self) -> None:
        if jnp.issubdtype(self.dtype, jax.dtypes.extended):
            raise ConfigError(f"{self.name} holds PRNG keys, which are not drawn: give inputs=")
        if isinstance(self.values, str):
            self._check_word()
        elif isinstance(self.values, tuple) and len(self.values) == 2:
            self._check_range(*self.values)
        elif self.values is not None and not isinstance(self.values, st.SearchStrategy):
            raise ConfigError(
                f"values={self.values!r} of {self.name} is unknown: use None, (low, high), "
                '"mask", "lengths", "positions" or a strategy for one element'
            )

    def check_axis(self, known: Sequence[str]) -> None:
        """Raises unless the axis that `values` names is one of those known.

        Raises:
            ConfigError: It is not; the message names the nearest one.
        """
        if self.counted not in ("", *known):
            raise ConfigError(
                f"values={self.values!r} of {self.name}: the config has no such axis; "
                f"{nearest(self.counted, known)}"
            )

    @property
    def uses(self) -> tuple[str, ...]:
        """The axes whose sizes make a difference to it."""
        return (*self.axes.names, self.counted)

    @property
    def counted(self) -> str:
        """The axis whose lengths or positions it has; empty where it has none."""
        found = _OF_SIZE.fullmatch(self.values) if isinstance(self.values, str) else None
        return "" if found is None else found[2] or "seq"

    def _check_range(self, low: float, high: float) -> None:
        if not low <= high or math.isinf(low) or math.isinf(high):
            raise ConfigError(f"values={self.values} of {self.name} is no range (low, high)")
        ends = np.array([low, high])
        with np.errstate(all="ignore"):
            kept = ends.astype(self.dtype).astype(ends.dtype)
        is_float = jnp.issubdtype(self.dtype, np.inexact)
        if not (np.all(np.isfinite(kept)) if is_float else np.array_equal(kept, ends)):
            raise ConfigError(
                f"values={self.values} of {self.name}: {self.dtype} does not hold both ends; give "
                "others"
            )

    def _check_word(self) -> None:
        if self.values != "mask" and not _OF_SIZE.fullmatch(self.values):
            known = " or ".join(f'"{word}"' for word in _WORDS)
            raise ConfigError(
                f"values={self.values!r} of {self.name}: use {known}, the last two with the name "
                'of an axis behind them where it is not seq: "lengths src"'
            )
        if self.values == "mask" and self.axes.along is None:
            raise ConfigError(
                f'values="mask" of {self.name}, which has no axis but the batch: name it in in_axes'
            )
        if self.values != "mask" and not jnp.issubdtype(self.dtype, np.integer):
            raise ConfigError(f'values="{self.values}" of {self.name}, whose dtype is {self.dtype}')


def is_values(value: object) -> bool:
    """Whether `value` says what arrays are filled with; a pair of numbers is one such thing."""
    if value is None or isinstance(value, (str, st.SearchStrategy)):
        return True
    is_pair = isinstance(value, tuple) and len(value) == 2
    if is_pair and all(isinstance(end, (int, float, np.number)) for end in value):  # type: ignore[attr-defined]
        return True
    return jax.tree_util.all_leaves((value,))


def draw_arrays(draw: st.DrawFn, specs: tuple[ArraySpec, ...], size: Bucket) -> list[Array]:
    """An array for each of `specs` in a call of `size`."""
    # From a seed, since the elements of arrays drawn by hypothesis are mostly equal.
    random = np.random.default_rng(draw(_SEEDS))
    sign = draw(_SIGNS)
    found = []
    for spec in specs:
        shape = spec.axes.resize(spec.shape, size)
        if isinstance(spec.values, st.SearchStrategy):
            found.append(draw(hnp.arrays(spec.dtype, shape, elements=spec.values)))
        else:
            found.append(_drawn(spec, shape, size, random, sign).astype(spec.dtype))
    return found


def _drawn(
    spec: ArraySpec, shape: tuple[int, ...], size: Bucket, random: np.random.Generator, sign: int
) -> npt.NDArray[Any]:
    """Values of one array; `sign` is that of normally distributed ones, or 0 for any."""
    if spec.values == "mask":
        return _mask(spec.axes, shape, random)
    if isinstance(spec.values, str):
        first = 1 if spec.values.startswith("lengths") else 0
        return first + random.integers(0, size.size(spec.counted), shape)
    if spec.dtype == np.bool_:
        low, high = (0, 1) if spec.values is None else spec.values
        return random.integers(int(low), int(high), shape, endpoint=True)
    if jnp.issubdtype(spec.dtype, np.integer):
        low, high = _INTEGERS if spec.values is None else spec.values
        return _integers(int(low), int(high), shape, random)
    if spec.values is not None:
        low, high = spec.values
        return random.uniform(float(low), float(high), shape)
    numbers = random.standard_normal(shape)
    if jnp.issubdtype(spec.dtype, np.complexfloating):
        return numbers + 1j * random.standard_normal(shape)
    return numbers if sign == 0 else sign * np.abs(numbers)


def _integers(
    low: int, high: int, shape: tuple[int, ...], random: np.random.Generator
) -> npt.NDArray[Any]:
    """Integers from `low` to `high`, all of them different where there are enough.

    Equal ones make ties, and rounding may break a tie in another way in a bucket.
    """
    count = int(np.prod(shape))
    if count <= high - low + 1 <= 2**31:
        return low + random.choice(high - low + 1, count, replace=False).reshape(shape)
    return random.integers(low, high, shape, endpoint=True)


def _mask(
    axes: LeafAxes, shape: tuple[int, ...], random: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Ones, then zeros, along the last axis that is not the batch: a 1 at least in each row.

    Where that is padded on the left, what is real stands at its end, as in the row itself.
    """
    along = axes.along or 0
    rows = [size if axis == axes.batch else 1 for axis, size in enumerate(shape)]
    lengths = random.integers(1, shape[along], rows, endpoint=True)
    others = [axis for axis in range(len(shape)) if axis != along]
    places = np.arange(shape[along])
    if dict(axes.dims)[along].left:
        places = places[::-1]
    return np.broadcast_to(np.expand_dims(places, others) < lengths, shape)
