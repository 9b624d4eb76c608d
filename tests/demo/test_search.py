"""The best passages for a query."""

import numpy as np

from cudagraph_jax.demo.corpus import Passage
from cudagraph_jax.demo.encoder import Match, search

PASSAGES = [Passage(name, f"about {name}") for name in "abcd"]
VECTORS = np.array([[1, 0], [0.6, 0.8], [0, 1], [0.6, 0.8]], np.float32)


def test_best_first():
    """The most similar come first, equal ones in the passages' order."""
    found = search(np.array([0, 1], np.float32), VECTORS, PASSAGES)
    assert [match.passage.name for match in found] == ["c", "b", "d"]
    assert found[0] == Match(PASSAGES[2], 1.0)


def test_top():
    """At most as many as asked for, and as there are."""
    query = np.array([1, 0], np.float32)
    assert len(search(query, VECTORS, PASSAGES, top=1)) == 1
    assert len(search(query, VECTORS, PASSAGES, top=9)) == 4
