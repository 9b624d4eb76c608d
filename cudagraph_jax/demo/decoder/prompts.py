"""Prompts as rows of token ids, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cudagraph_jax.errors import InputShapeError

Prompt = Sequence[int] | npt.NDArray[np.integer]


def checked_prompts(prompts: Sequence[Prompt], *, vocab_size: int) -> list[list[int]]:
    """The prompts as lists of token ids.

    Args:
        prompts: Token ids of each prompt.
        vocab_size: Tokens that the model knows.

    Raises:
        InputShapeError: No prompt at all, one without tokens, one that is no list of integers, or
            an id that the model does not know.
    """
    if not len(prompts):
        raise InputShapeError("prompts is empty: give at least one prompt")
    return [
        _checked(prompt, f"prompts[{index}]", vocab_size) for index, prompt in enumerate(prompts)
    ]


def _checked(prompt: Prompt, name: str, vocab_size: int) -> list[int]:
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of several lengths
        ids = np.empty((0, 0))
    if ids.ndim == 1 and not ids.size:
        raise InputShapeError(f"{name} is empty: give at least one token, such as a start token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputShapeError(
            f"{name}={prompt!r:.60} is no row of token ids: give a list of integers"
        )
    for token in (ids.min(), ids.max()):
        if not 0 <= token < vocab_size:
            raise InputShapeError(
                f"{name} has the token {token}, expected ids from 0 to {vocab_size - 1}"
            )
    row: list[int] = ids.tolist()
    return row
