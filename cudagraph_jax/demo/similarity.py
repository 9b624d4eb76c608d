"""The best passages for a query, by cosine similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cudagraph_jax.demo.corpus import Passage
from cudagraph_jax.demo.encoder import Embeddings


@dataclass(frozen=True, slots=True)
class Match:
    """A passage and the cosine of the angle between it and the query."""

    passage: Passage
    score: float


def search(
    query: Embeddings, vectors: Embeddings, passages: Sequence[Passage], *, top: int = 3
) -> list[Match]:
    """The passages most similar to a query, the best first.

    Args:
        query: A unit vector (384,).
        vectors: Unit vectors of the passages (passages, 384).
        passages: What they stand for.
        top: At most this many.
    """
    scores = vectors @ query
    best = np.argsort(-scores, kind="stable")[:top]
    return [Match(passages[int(index)], float(scores[index])) for index in best]
