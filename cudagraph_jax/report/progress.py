"""Progress of a long step: a bar in a notebook, one by rich on a terminal, else log lines."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cudagraph_jax._base.log import logger
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.shapes import ladder

Callback = Callable[[int, int, Any], object]


class BucketStep(ladder.Bucket):
    """A bucket and what is done with it: equal to the bucket, and shown as `compile 4x8`.

    Attributes:
        phase: `"compile"` or `"run"`.
        note: What is to be said of it before it is done, such as `"for 10 s so far"`; else empty.
    """

    phase = ""
    note = ""

    @classmethod
    def at(cls, bucket: ladder.Bucket, *, phase: str, note: str = "") -> BucketStep:
        """The step of a bucket."""
        step = cls.of(bucket.sizes)
        step.phase, step.note = phase, note
        return step

    def __str__(self) -> str:
        return f"{self.phase} {super().__str__()} {self.note}".strip()


Show = Callable[[int, object, str], object]


class Steps:
    """Counts the steps of one sequence, and shows them.

    Args:
        show: Called with how many are done, the item, and a note while that one is not done yet.
    """

    def __init__(self, show: Show) -> None:
        self._show = show
        self._done = 0

    def __call__(self, item: object) -> None:
        """Shows that the step of `item` is done."""
        self._done += 1
        self._show(self._done, item, "")

    def note(self, item: object, text: str) -> None:
        """Shows something of the step that is under way."""
        self._show(self._done, item, text)


class Progress:
    """Shows how far a sequence of steps has come.

    Args:
        shown: None: a bar in a notebook, and on a terminal where rich is installed, else log lines
            at INFO. False: nothing. A function: called with (done, total, item) after each step,
            and of one that takes long also before it is done.

    Raises:
        ConfigError: `shown` is none of these.
    """

    def __init__(self, shown: Callback | bool | None = None) -> None:
        if not (shown is None or isinstance(shown, bool) or callable(shown)):
            raise ConfigError(
                f"progress={shown!r:.80} is no way to show it: give None, False for nothing, or a "
                "function of (done, total, bucket)"
            )
        self._shown = shown

    @contextmanager
    def over(self, total: int, title: str, *, phase: str = "") -> Iterator[Steps]:
        """What to call with each item when its step is done.

        Args:
            total: How many there are.
            title: What the steps are, for a bar or a log.
            phase: The same in a word, where the items are buckets: a function is given
                `BucketStep` then.
        """
        if self._shown is False:
            yield Steps(lambda done, item, note: None)
        elif callable(self._shown):
            yield Steps(_calling(self._shown, total, phase))
        elif (display := _notebook_display()) is not None:
            yield Steps(_displaying(display, total, title))
        elif _can_draw():
            with _drawing(total, title) as show:
                yield Steps(show)
        else:
            yield Steps(_logging(total, title))


def _calling(callback: Callback, total: int, phase: str) -> Show:
    def call(done: int, item: object, note: str) -> None:
        if phase and isinstance(item, ladder.Bucket):
            item = BucketStep.at(item, phase=phase, note=note)
        elif note:
            return  # which a function of three arguments could not tell from a step that is done
        callback(done, total, item)

    return call


def _logging(total: int, title: str) -> Show:
    def log(done: int, item: object, note: str) -> None:
        if not note:  # who notes something logs it, too
            logger.info("%s: %s (%d of %d)", title, item, done, total)

    return log


def _notebook_display() -> Callable[..., Any] | None:
    """What shows something in the notebook whose kernel this process is; None elsewhere."""
    interactive = sys.modules.get("IPython")  # imported by every kernel, and by nobody for this
    shell = None if interactive is None else interactive.get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display

    shown: Callable[..., Any] = display
    return shown


def _displaying(display: Callable[..., Any], total: int, title: str) -> Show:
    """One bar, drawn by the browser and redrawn in its place; where there is none, one line."""

    def look(done: int, item: object, note: str) -> dict[str, str]:
        line = f"{title}: {done} of {total} {item} {note}".strip()
        bar = f'<progress value="{done}" max="{max(total, 1)}"></progress> {html.escape(line)}'
        return {"text/plain": line, "text/html": bar}

    handle = display(look(0, "", ""), raw=True, display_id=True)
    return lambda done, item, note: handle.update(look(done, item, note), raw=True)


def _can_draw() -> bool:
    if not sys.stderr.isatty():
        return False
    try:
        import rich  # noqa: F401  # asked for, used in _drawing
    except ImportError:
        return False
    return True


@contextmanager
def _drawing(total: int, title: str) -> Iterator[Show]:
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
        yield lambda done, item, note: bar.update(
            task, completed=done, item=f"{item} {note}".strip()
        )
