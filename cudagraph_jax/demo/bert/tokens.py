"""Text to token ids, and rows of ids to the rectangle that the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cudagraph_jax.demo.bert.model_folder import SAVE_AGAIN, ModelFolder
from cudagraph_jax.demo.requirements import DemoError, missing_dependency

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

MAX_TOKENS = 256
"""The limit of all-MiniLM-L6-v2, [CLS] and [SEP] included."""

_LONG = 1 << 14
"""Characters of a text that are read at first: 256 tokens are 1,200 of English."""

Row = Sequence[int]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Gives the token ids of each text, special tokens included.

    Attributes:
        tokenizer: Cuts each text after the most tokens that the model takes.
        prompt: What stands in front of each text.
    """

    tokenizer: Tokenizer
    prompt: str = ""

    def __call__(self, texts: Sequence[str]) -> list[Row]:
        """One row of ids for each text."""
        return [encoding.ids for encoding in self._encodings(texts)]

    def with_cuts(self, texts: Sequence[str]) -> tuple[list[Row], list[bool]]:
        """One row of ids for each text, and whether the text has lost its end."""
        encodings = self._encodings(texts)
        return [one.ids for one in encodings], [bool(one.overflowing) for one in encodings]

    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        whole = [self.prompt + text for text in texts]
        encodings = self.tokenizer.encode_batch([text[:_LONG] for text in whole])
        for index, text in enumerate(whole):
            if len(text) > _LONG:
                encodings[index] = self._of_a_long_text(text)
        return encodings

    def _of_a_long_text(self, text: str) -> Encoding:
        """As if all of it were read, of which a few pages may decide: 8 MB take 18 s and 4 GB."""
        end = _LONG
        while True:
            encoding = self.tokenizer.encode(text[:end])
            # The cut goes through a word, whose tokens are far behind those that are kept.
            if end >= len(text) or len(encoding.overflowing) >= 2:
                return encoding
            end *= 2


def load_tokenizer(folder: ModelFolder, *, max_tokens: int | None = None) -> Tokenize:
    """The tokenizer of a model, without padding.

    Args:
        folder: The model.
        max_tokens: Longer texts lose their end; the model's limit if None.

    Raises:
        DemoError: tokenizers is not installed, its file is broken or has tokens that the model has
            not, or `max_tokens` leaves none to a text.
    """
    try:
        from tokenizers import Tokenizer, normalizers
    except ImportError:
        raise missing_dependency("tokenizers") from None
    try:
        tokenizer = Tokenizer.from_file(str(folder.tokenizer))
    except Exception as error:  # of no type of its own
        raise DemoError(
            f"{folder.tokenizer} cannot be read ({error}): write it again by "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), of transformers"
        ) from None
    most = folder.max_tokens if max_tokens is None else max_tokens
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if most <= special:  # the tokenizer would not cut at all
        raise DemoError(
            f"{most} tokens at most are {special} special ones and none of a text: give longer "
            "capture_seq_lens, or another model"
        )
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= folder.architecture.vocab_size:
        raise DemoError(
            f"{folder.tokenizer} has the token id {largest}, expected less than "
            f"vocab_size={folder.architecture.vocab_size}: {SAVE_AGAIN}"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=most)
    if folder.lower_case:
        others = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])
    return Tokenize(tokenizer, folder.prompt)


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
