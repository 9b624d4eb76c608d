"""A configuration as Python code."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from cudagraph_jax.config import CUDAGraphConfig

_WIDTH = 88
_PUT_BATCHES = "  # no batch sizes were given: put yours here"


def config_source(config: CUDAGraphConfig, *, lengths_alone: bool) -> str:
    """Code that makes a configuration with the same two ladders.

    Args:
        config: With ladders on both axes.
        lengths_alone: Whether its batch ladder is only a place for one.
    """
    batches = _field("capture_sizes", config.capture_sizes, _PUT_BATCHES if lengths_alone else "")
    lengths = _field("capture_seq_lens", config.capture_seq_lens or ())
    return (
        "from cudagraph_jax import CUDAGraphConfig\n\n"
        f"config = CUDAGraphConfig(\n{batches}\n{lengths}\n)"
    )


def _field(name: str, ladder: Sequence[int], comment: str = "") -> str:
    line = f"    {name}={tuple(ladder)!r},{comment}"
    if len(line) <= _WIDTH:
        return line
    sizes = textwrap.fill(
        ", ".join(map(str, ladder)) + ",", _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8
    )
    return f"    {name}=({comment}\n{sizes}\n    ),"
