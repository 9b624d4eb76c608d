"""What is stored beside an executable: its outputs for each grid, and the compiler's figures."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

from cudagraph_jax.capture.compile_request import Wanted
from cudagraph_jax.errors import InputShapeError, StoreError
from cudagraph_jax.program.outputs import Outputs, outputs_from_json, outputs_to_json
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.store import Json, Stored
from cudagraph_jax.xla.stages import Executable

MOST_GRIDS = 8
"""How many grids' outputs a file describes; those described first go first."""
N = TypeVar("N", int, float)

_MOST = 1 << 62


def beside(
    wanted: Wanted, outputs: Outputs, executable: Executable, *, stored: Stored | None = None
) -> dict[str, Json]:
    """What is stored beside an executable, so that loading need not find it out again.

    Args:
        wanted: What it is for.
        outputs: Its outputs, whose axes were found by the grid of `wanted`.
        executable: The executable.
        stored: Where it was loaded from; what stands there of other grids stays.
    """
    own = outputs._replace(structure=jax.tree.structure(executable.output_info))
    others = {} if stored is None else dict(_by_grid(stored))
    others.pop(wanted.grid, None)
    by_grid = [*others.items(), (wanted.grid, outputs_to_json(own))]
    return {
        "outputs": [list(pair) for pair in by_grid[-MOST_GRIDS:]],
        "memory_bytes": executable.memory_bytes,
        "flops": executable.flops,
        "compile_ms": round(executable.compile_ms, 3),
    }


def knows_grid(wanted: Wanted, stored: Stored) -> bool:
    """Whether it says what the outputs are for this grid, if that can be written at all."""
    return wanted.grid in dict(_by_grid(stored))


def check_outputs(outputs: Outputs, executable: Executable, bucket: Bucket) -> None:
    """Refuses axes that the executable's outputs do not have."""
    try:
        shapes = [tuple(info.shape) for info in jax.tree.leaves(executable.output_info)]
        fits = outputs.structure.num_leaves == len(shapes) and all(
            leaf.ndim == len(shape) and leaf.axes.resize(shape, bucket) == shape
            for leaf, shape in zip(outputs.leaves, shapes, strict=True)
        )
    except (ValueError, LookupError):
        fits = False
    if not fits:
        raise StoreError("its outputs are not what its header says")


def number_of(stored: Stored, name: str, kind: type[N]) -> N | None:
    """A figure that the file states; None where it is no such number."""
    value = stored.extra.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return kind(value) if 0 <= value < _MOST else None


def _by_grid(stored: Stored) -> list[tuple[str, Any]]:
    """What a file says of the outputs for each grid, the newest last."""
    written: Any = stored.extra.get("outputs")
    pairs = written if isinstance(written, list) else []
    return [
        (pair[0], pair[1])
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
    ]


def outputs_in(stored: Stored, grid: str | None = None) -> Outputs | None:
    """The outputs for a grid, or for any; None where the file does not say."""
    by_grid = _by_grid(stored)
    written = dict(by_grid).get(grid) if grid is not None else next(iter(by_grid), ("", None))[1]
    try:
        return outputs_from_json(written)
    except (LookupError, TypeError, ValueError, InputShapeError) as error:
        raise StoreError(f"its outputs are not described: {error}") from error
