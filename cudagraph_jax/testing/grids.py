"""Strategies for ladders, configurations and sizes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from cudagraph_jax._base.checks import nearest
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.shapes.ladder import Bucket, Ladder


def ladders(*, max_size: int = 16, max_rungs: int = 4) -> st.SearchStrategy[Ladder]:
    """Ladders of up to `max_rungs` sizes, the largest of them at most `max_size`.

    Raises:
        ConfigError: One of the two is below 1.

    Example:
        >>> from hypothesis import find
        >>> find(ladders(), lambda ladder: len(ladder) > 1)
        Ladder((1, 2))
    """
    for name, value in (("max_size", max_size), ("max_rungs", max_rungs)):
        if value < 1:
            raise ConfigError(f"{name}={value} is below 1: a ladder has a size, and that a row")
    rungs = st.integers(1, max_size)
    return st.sets(rungs, min_size=1, max_size=min(max_rungs, max_size)).map(Ladder)


@st.composite
def configs(
    draw: st.DrawFn,
    /,
    *,
    max_batch_size: int = 8,
    max_seq_len: int = 16,
    max_sizes: Mapping[str, int] | None = None,
    **fields: Any,
) -> CUDAGraphConfig:
    """Valid configurations with a small grid, of any policy, with a token budget or without.

    Args:
        draw: Given by hypothesis.
        max_batch_size: The largest batch that gets a graph, at most.
        max_seq_len: The largest sequence length that gets a graph, at most.
        max_sizes: The same by the names of the axes that it has beside those: `{"height": 32}`.
        **fields: Fields of `CUDAGraphConfig` that are not drawn.

    Raises:
        ConfigError: A field that there is not, or a value that is not valid.
    """
    lengths = ladders(max_size=max_seq_len)
    if max_sizes and "capture_axes" in fields:
        raise ConfigError(
            f"max_sizes={dict(max_sizes)} and capture_axes={fields['capture_axes']!r} both say "
            "which axes there are: leave one out"
        )
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "capture_sizes": ladders(max_size=max_batch_size),
        "capture_seq_lens": st.none() | lengths,
        "capture_axes": st.fixed_dictionaries(
            {axis: ladders(max_size=size) for axis, size in (max_sizes or {}).items()}
        ),
        "on_miss": st.sampled_from(["capture", "background", "eager", "error"]),
        "on_overflow": st.sampled_from(["eager", "split", "exact", "error"]),
        "max_graphs": st.none() | st.integers(1, 64),
        "warmup_iterations": st.integers(0, 2),
    }
    chosen = {name: draw(values) for name, values in drawn.items() if name not in fields}
    if chosen.get("capture_seq_lens", fields.get("capture_seq_lens")) is None:
        chosen.setdefault("max_capture_seq_len", fields.get("max_capture_seq_len", max_seq_len))
    config = CUDAGraphConfig.from_dict({**chosen, **fields})
    if "max_bucket_elements" in fields:
        return config
    rungs = [config.ladder(axis) or (1, config.max_seq_len) for axis in axes_of(config)]
    least, most = math.prod(map(min, rungs)), math.prod(map(max, rungs))
    return replace(config, max_bucket_elements=draw(st.none() | st.integers(least, most)))


def sizes(
    config: CUDAGraphConfig,
    *,
    max_batch_size: int | None = None,
    max_seq_len: int | None = None,
    max_sizes: Mapping[str, int] | None = None,
) -> st.SearchStrategy[Bucket]:
    """Sizes of all axes inside the limits of `config`, often at an edge.

    Edges are 1, the size of a bucket, one above it, and the largest.

    Args:
        config: The grid and its limits.
        max_batch_size: The largest batch to draw, where that is less than the config's.
        max_seq_len: The largest sequence length to draw, where that is less than the config's.
        max_sizes: The same by the name of the axis: `{"height": 32}`.

    Raises:
        ConfigError: A limit is below 1, or of an axis that there is not.

    Example:
        >>> from hypothesis import find
        >>> config = CUDAGraphConfig(capture_sizes=(2, 4), capture_seq_lens=(8,))
        >>> find(sizes(config), lambda size: size.batch_size > 2)
        Bucket(batch_size=3, seq_len=1)
    """
    return sizes_below(config, limits_of(config, max_batch_size, max_seq_len, max_sizes))


def sizes_below(
    config: CUDAGraphConfig,
    limits: Mapping[str, int],
    *,
    least: Callable[[str], int] = lambda axis: 1,
) -> st.SearchStrategy[Bucket]:
    """Sizes of all axes up to `limits`, or else to those of `config`.

    Args:
        config: The grid and its limits.
        limits: The largest size of some axes.
        least: Gives the smallest size of an axis.

    Raises:
        ConfigError: The smallest size of an axis is above its largest.
    """
    drawn = {}
    for axis in axes_of(config):
        limit = min(limits.get(axis, config.largest(axis)), config.largest(axis))
        if (low := least(axis)) > limit:
            raise ConfigError(
                f"no size of {axis} up to {limit} leaves an element in all arrays: allow {low}"
            )
        drawn[axis] = _near_edges(config.ladder(axis) or (), low, limit)
    return st.fixed_dictionaries(drawn).map(lambda found: _within_budget(config, found, least))


def _within_budget(
    config: CUDAGraphConfig, found: Mapping[str, int], least: Callable[[str], int]
) -> Bucket:
    """The sizes, each cut in turn to what `max_bucket_elements` allows beside the others."""
    sizes = Bucket.of(found)
    for axis in found:
        sizes = sizes.with_sizes({axis: max(least(axis), _most(config, axis, sizes))})
    return sizes


def _most(config: CUDAGraphConfig, axis: str, sizes: Bucket) -> int:
    def is_over(size: int) -> bool:
        return not config.allows(config.padded(sizes.with_sizes({axis: size})))

    return bisect_left(range(1, sizes.size(axis) + 1), True, key=is_over)


def axes_of(config: CUDAGraphConfig) -> list[str]:
    """The names of all axes."""
    return ["batch", "seq", *config.capture_axes]


def limits_of(
    config: CUDAGraphConfig,
    max_batch_size: int | None,
    max_seq_len: int | None,
    max_sizes: Mapping[str, int] | None,
) -> dict[str, int]:
    """The limits that are given, by axis, the least where there are two of one.

    Raises:
        ConfigError: One is below 1, or of an axis that `config` does not have.
    """
    given = [("max_batch_size", "batch", max_batch_size), ("max_seq_len", "seq", max_seq_len)]
    given += [(f"max_sizes[{axis!r}]", axis, size) for axis, size in (max_sizes or {}).items()]
    known = axes_of(config)
    limits: dict[str, int] = {}
    for name, axis, size in given:
        if axis not in known:
            raise ConfigError(f"{name}={size}: the config has no such axis; {nearest(axis, known)}")
        if size is not None and size < 1:
            raise ConfigError(
                f"{name}={size} is below 1: a call has one row and one element at least"
            )
        if size is not None:
            limits[axis] = min(size, limits.get(axis, size))
    return limits


def _near_edges(rungs: Sequence[int], least: int, limit: int) -> st.SearchStrategy[int]:
    """Sizes from `least` to `limit`; half of them next to a rung of a ladder."""
    edges = {least, limit, *rungs, *(rung + 1 for rung in rungs)}
    # The first one is what failures shrink to.
    return st.integers(least, limit) | st.sampled_from(
        sorted(edge for edge in edges if least <= edge <= limit)
    )
