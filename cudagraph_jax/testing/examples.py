"""Running an assertion over examples that hypothesis draws and shrinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given

from cudagraph_jax.shapes.pytrees import PyTree

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.nested_given]


class Example:
    """The positional arguments of one call, shown without what is passed through.

    Attributes:
        args: All of them.
    """

    def __init__(self, args: tuple[PyTree, ...], shown: dict[str, Any]) -> None:
        self.args = args
        self._shown = shown

    def __repr__(self) -> str:
        with np.printoptions(threshold=32, precision=5):
            return f"({', '.join(f'{name}={value!r}' for name, value in self._shown.items())})"


def check_examples(
    check: Callable[[tuple[PyTree, ...]], None],
    examples: hypothesis.strategies.SearchStrategy[Example],
    *,
    settings: hypothesis.settings | None,
) -> None:
    """Calls `check` with the arguments of each example; what it raises is that of the simplest.

    Args:
        check: Raises where something is wrong.
        examples: What to draw from.
        settings: Hypothesis's; those of the profile in use if None. Compiling takes its time, so
            there is no deadline.
    """
    settings = settings or hypothesis.settings()

    @hypothesis.settings(
        settings,
        # It would tell lines of this package.
        phases=[phase for phase in settings.phases if phase is not Phase.explain],
        deadline=None,
        # It is kept by the code of the test, which is the same for all functions.
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=_SLOW,
    )
    @given(examples)
    def holds(example: Example) -> None:
        check(example.args)

    holds()
