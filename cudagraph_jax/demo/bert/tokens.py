"""Text to token ids, and rows of ids to the rectangle that the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cudagraph_jax.demo.requirements import missing_dependency

MAX_TOKENS = 256
"""The model's limit, [CLS] and [SEP] included: `max_seq_length` in its configuration."""

Row = Sequence[int]
IntArray = npt.NDArray[np.int32]


class Tokenize(Protocol):
    """Gives the token ids of each text, special tokens included."""

    def __call__(self, texts: Sequence[str]) -> list[Row]:
        """One row of ids for each text, `MAX_TOKENS` long at the most."""


def load_tokenizer(path: Path, *, max_tokens: int = MAX_TOKENS) -> Tokenize:
    """The tokenizer of a `tokenizer.json`, without padding.

    Args:
        path: The file.
        max_tokens: Longer texts lose their end.

    Raises:
        DemoError: tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise missing_dependency("tokenizers") from None
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=max_tokens)

    def tokenize(texts: Sequence[str]) -> list[Row]:
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]

    return tokenize


def stack(rows: Sequence[Row]) -> tuple[IntArray, IntArray]:
    """The ids and the mask of a micro-batch, as long as its longest row.

    Args:
        rows: Token ids of at least one text.

    Returns:
        Two int32 arrays (batch, seq); the mask is 1 where a token is real.
    """
    return padded(rows), padded([np.ones(len(row), np.int32) for row in rows])


def padded(rows: Sequence[Row | IntArray]) -> IntArray:
    """The rows below each other, 0 behind those that are shorter than the longest.

    Args:
        rows: At least one, int32 (seq,) each.
    """
    whole = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for index, row in enumerate(rows):
        whole[index, : len(row)] = row
    return whole
