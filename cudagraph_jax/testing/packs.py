"""Packing does not change the answer: each row alone equals its part of a packed call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import hypothesis
import jax
import numpy as np

from cudagraph_jax.batching.packing import Packed, pack
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.graphs.compare import Tolerance, worst_difference
from cudagraph_jax.shapes.padding import Array
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.testing.examples import Example, check_examples

_GRID = CUDAGraphConfig(capture_sizes=(8,), capture_seq_lens=(16,))


def assert_packing_preserves(
    fn: Callable[[Array, Array, Array], PyTree],
    *,
    vocabulary: int = 100,
    config: CUDAGraphConfig | None = None,
    max_segments: int = 4,
    tokens: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
    settings: hypothesis.settings | None = None,
) -> None:
    """Fails unless `fn` gives each row the answer that it has alone, whatever shares its row.

    Args:
        fn: The model, of `(ids, positions, segments)`, each int32 `(batch, seq)`, as `pack` gives
            them.
        vocabulary: Ids are below it.
        config: The grid; None: rows of 16.
        max_segments: How many rows may share one.
        tokens: Whether the outputs are `(batch, seq, …)`, not `(batch, max_segments, …)`.
        rtol: How far answers may be apart: `atol + rtol * abs(expected)`.
        atol: If both are None: half of the digits of the largest element.
        settings: Hypothesis's.

    Raises:
        AssertionError: An answer differs; the message says whose.

    Example:
        >>> import jax.numpy as jnp
        >>> def doubled(ids, positions, segments):
        ...     return ids * 2  # each token by itself
        >>> assert_packing_preserves(doubled, tokens=True)
    """
    grid = _GRID if config is None else config
    longest = max(grid.capture_seq_lens or (16,))
    ids = hypothesis.strategies.integers(0, vocabulary - 1)
    row = hypothesis.strategies.lists(ids, min_size=1, max_size=longest)
    drawn = hypothesis.strategies.lists(row, min_size=2, max_size=6).map(
        lambda rows: Example(tuple(rows), {"rows": rows})
    )

    def answers(packed: Packed) -> list[PyTree]:
        outputs = fn(packed.ids, packed.positions, packed.segments)
        return packed.unpack_tokens(outputs) if tokens else packed.unpack(outputs)

    def check(rows: Sequence[Sequence[int]]) -> None:
        arrays = [np.array(row, np.int32) for row in rows]
        packed = pack(arrays, config=grid, max_segments=max_segments)
        for index, (array, found) in enumerate(zip(arrays, answers(packed), strict=True)):
            alone = answers(pack([array], config=grid, max_segments=max_segments))[0]
            _require_close(found, alone, packed, index, Tolerance(rtol, atol))

    check_examples(check, drawn, settings=settings)


def _require_close(
    found: PyTree, alone: PyTree, packed: Packed, index: int, tolerance: Tolerance
) -> None:
    """Raises unless the answer to one row is what it is alone."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True)
    for name, (ours, theirs) in enumerate(pairs):
        worst = worst_difference(ours, theirs, tolerance=tolerance)
        if worst is not None:
            at = packed.places[index]
            shape = "x".join(map(str, packed.ids.shape))
            raise AssertionError(
                f"a row gets another answer in company than alone\n"
                f"  row:    {index}, of {at.length}, segment {at.segment + 1} of row {at.row} in "
                f"{shape}, from position {at.start}\n"
                f"  output: {name}{list(worst.at)} is {worst.found}, but alone {worst.expected}\n"
                "  remedy: attend within a segment alone (segments[:, :, None] == "
                "segments[:, None, :]), and take positions from the argument"
            )
