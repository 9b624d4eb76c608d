"""A plan's figure as a file, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cudagraph_jax.cli.outputs import check_writable, not_writable
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.shapes.plan import BucketPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_INCHES = (8.0, 4.5)
DPI = 150


def check_plot(path: Path) -> None:
    """Finds out what would keep the figure from being drawn or written.

    Raises:
        ConfigError: matplotlib is not installed, does not write such files, or cannot write here.
    """
    known = _figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise ConfigError(
            f"{path} is no kind of picture: give a name that ends in .png, .svg or .pdf"
        )
    check_writable(path)


def save_plot(plan: BucketPlan, path: Path) -> None:
    """Draws waste over number of buckets.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _figure()
    plan.plot(figure.subplots())
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise not_writable(path, error) from error


def _figure() -> Figure:
    # No pyplot: it looks for a display and keeps every figure.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: run pip install 'cudagraph-jax[plot]'"
        ) from error
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
