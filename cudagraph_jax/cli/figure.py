"""A plan's figure as a file, drawn without a display."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from cudagraph_jax._base.files import check_writable, write_whole
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.planning.plan import BucketPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_INCHES = (8.0, 4.5)
DPI = 150


def check_plot(path: Path) -> None:
    """Finds out what would keep the figure from being drawn or written.

    Raises:
        ConfigError: matplotlib is not installed, or does not write such files.
        ReportError: The file could not be written.
    """
    if _form(path) not in _figure().canvas.get_supported_filetypes():
        raise ConfigError(
            f"{path} is no kind of picture: give a name that ends in .png, .svg or .pdf"
        )
    check_writable(path)


def save_plot(plan: BucketPlan, path: Path) -> None:
    """Draws waste over number of buckets.

    Raises:
        ConfigError: matplotlib is not installed.
        ReportError: The file cannot be written.
    """
    figure = _figure()
    plan.plot(figure.subplots())
    drawn = io.BytesIO()
    figure.savefig(drawn, format=_form(path), dpi=DPI)
    write_whole(path, drawn.getvalue())


def _form(path: Path) -> str:
    """What kind of picture the name asks for, in matplotlib's words."""
    return path.suffix.lower().removeprefix(".")


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
