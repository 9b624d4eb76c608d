"""How thoroughly properties are tried: usually at few examples, at more in their own profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from hypothesis import Phase, settings

IS_THOROUGH = settings.default == settings.get_profile("thorough")
# For `find` where any example will do: none is shrunk.
ANY = settings(max_examples=10_000, database=None, phases=[Phase.generate])


def examples(usual: int, *, thorough: int, **options: Any) -> settings:
    """Settings of a property whose examples compile, or take their time in another way."""
    return settings(max_examples=thorough if IS_THOROUGH else usual, **options)


def as_a_whole(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for each size; thoroughly it is run as it is, operation by operation.

    Each operation of a plain function is compiled for every size: ten times as much.
    """
    return fn if IS_THOROUGH else jax.jit(fn)
