"""Strategies for ladders, configurations and sizes."""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import Any

from hypothesis import strategies as st

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
    draw: st.DrawFn, /, *, max_batch_size: int = 8, max_seq_len: int = 16, **fields: Any
) -> CUDAGraphConfig:
    """Valid configurations with a small grid, of any policy.

    Args:
        draw: Given by hypothesis.
        max_batch_size: The largest batch that gets a graph, at most.
        max_seq_len: The largest sequence length that gets a graph, at most.
        **fields: Fields of `CUDAGraphConfig` that are not drawn.

    Raises:
        ConfigError: A field that there is not, or a value that is not valid.
    """
    lengths = ladders(max_size=max_seq_len)
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "capture_sizes": ladders(max_size=max_batch_size),
        "capture_seq_lens": st.none() | lengths,
        "on_miss": st.sampled_from(["capture", "background", "eager", "error"]),
        "on_overflow": st.sampled_from(["eager", "split", "exact", "error"]),
        "max_graphs": st.none() | st.integers(1, 64),
        "warmup_iterations": st.integers(0, 2),
    }
    chosen = {name: draw(values) for name, values in drawn.items() if name not in fields}
    if chosen.get("capture_seq_lens", fields.get("capture_seq_lens")) is None:
        chosen.setdefault("max_capture_seq_len", fields.get("max_capture_seq_len", max_seq_len))
    return CUDAGraphConfig.from_dict({**chosen, **fields})


def sizes(
    config: CUDAGraphConfig, *, max_batch_size: int | None = None, max_seq_len: int | None = None
) -> st.SearchStrategy[Bucket]:
    """Sizes (batch, seq_len) inside the limits of `config`, often at an edge.

    Edges are 1, the size of a bucket, one above it, and the largest.

    Args:
        config: The grid and its limits.
        max_batch_size: The largest batch to draw, where that is less than the config's.
        max_seq_len: The largest sequence length to draw, where that is less than the config's.

    Raises:
        ConfigError: A limit is below 1.

    Example:
        >>> from hypothesis import find
        >>> config = CUDAGraphConfig(capture_sizes=(2, 4), capture_seq_lens=(8,))
        >>> find(sizes(config), lambda size: size.batch_size > 2)
        Bucket(batch_size=3, seq_len=1)
    """
    batch = _limit("max_batch_size", max_batch_size, config.max_batch_size)
    seq = _limit("max_seq_len", max_seq_len, config.max_seq_len)
    drawn = st.builds(
        Bucket, _near_edges(config.capture_sizes, batch), _near_edges(config.capture_seq_lens, seq)
    )
    return drawn.map(partial(_within_budget, config))


def _within_budget(config: CUDAGraphConfig, sizes: Bucket) -> Bucket:
    """`sizes`, each cut in turn to what `max_bucket_elements` allows beside the others."""
    for axis in sizes.sizes:
        sizes = sizes.with_sizes({axis: _most(config, axis, sizes)})
    return sizes


def _most(config: CUDAGraphConfig, axis: str, sizes: Bucket) -> int:
    def is_over(size: int) -> bool:
        return not config.allows(config.padded(sizes.with_sizes({axis: size})))

    return max(1, bisect_left(range(1, sizes.size(axis) + 1), True, key=is_over))


def _limit(name: str, given: int | None, allowed: int) -> int:
    if given is None:
        return allowed
    if given < 1:
        raise ConfigError(f"{name}={given} is below 1: a call has one row and one element at least")
    return min(given, allowed)


def _near_edges(rungs: Any, limit: int) -> st.SearchStrategy[int]:
    """Sizes from 1 to `limit`; half of them next to a rung of a ladder."""
    edges = {1, limit, *(rungs or ()), *(rung + 1 for rung in rungs or ())}
    # The first one is what failures shrink to.
    return st.integers(1, limit) | st.sampled_from(sorted(edge for edge in edges if edge <= limit))
