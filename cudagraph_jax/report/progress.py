"""Progress of a long step: rich where it is installed and somebody watches, else log lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cudagraph_jax._base.log import logger

Step = Callable[[object], None]
Callback = Callable[[int, int, object], None]


class Progress:
    """Shows how far a sequence of steps has come.

    Args:
        shown: None: a bar on a terminal where rich is installed, else log lines at INFO. False:
            nothing. A function: called with (done, total, item) after each step.
    """

    def __init__(self, shown: Callback | bool | None = None) -> None:
        self._shown = shown

    @contextmanager
    def over(self, total: int, title: str) -> Iterator[Step]:
        """A function to call with each item when its step is done."""
        if self._shown is False:
            yield lambda item: None
        elif callable(self._shown):
            yield _calling(self._shown, total)
        elif _can_draw():
            with _drawing(total, title) as step:
                yield step
        else:
            yield _calling(_logging(title), total)


def _calling(callback: Callback, total: int) -> Step:
    done = 0

    def step(item: object) -> None:
        nonlocal done
        done += 1
        callback(done, total, item)

    return step


def _logging(title: str) -> Callback:
    def log(done: int, total: int, item: object) -> None:
        logger.info("%s: %s (%d of %d)", title, item, done, total)

    return log


def _can_draw() -> bool:
    if not sys.stderr.isatty():
        return False
    try:
        import rich  # noqa: F401  # asked for, used in _drawing
    except ImportError:
        return False
    return True


@contextmanager
def _drawing(total: int, title: str) -> Iterator[Step]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[item]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, item="")
        yield lambda item: bar.update(task, advance=1, item=str(item))
