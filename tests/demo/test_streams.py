"""Single texts: who waits how long, in the order in which they are served."""

import itertools

import numpy as np
import pytest

from cudagraph_jax.demo.bert.model import MINILM
from cudagraph_jax.demo.streams import in_fifo_batches, through_batcher

ROWS = [[1 + place] * (1 + place % 7) for place in range(40)]


def first_ids(ids, mask):
    return np.repeat(ids[:, :1].astype(np.float32), MINILM.embedding_size, axis=1)


@pytest.mark.parametrize("clients", [16, 20, 64])
def test_fifo(clients):
    """A text waits for the call that has it, from the moment when its client had an answer."""
    ticks = itertools.count()
    shapes: list[object] = []
    stream = in_fifo_batches(
        first_ids,
        ROWS,
        elements=lambda batch, seq: batch * 8,
        clients=clients,
        step=shapes.append,
        clock=lambda: float(next(ticks)),
    )
    np.testing.assert_array_equal(stream.vectors[:, 0], [row[0] for row in ROWS])
    assert shapes == ["16x7", "16x7", "8x7"]
    assert (stream.calls, stream.shapes) == (3, 2)
    assert stream.real_elements == sum(map(len, ROWS))
    assert stream.computed_elements == 40 * 8
    assert (stream.seconds, stream.compiles, stream.stalled_seconds) == (3.0, 0, 0.0)
    # Calls end at 1, 2 and 3, and those whose text is answered send the next one then.
    first = {16: [1, 1], 20: [1, 2], 64: [1, 2]}[clients]
    assert [stream.latencies_ms[place] / 1e3 for place in (0, 16)] == first
    assert stream.latencies_ms[39] / 1e3 == {16: 1, 20: 1, 64: 3}[clients]


@pytest.mark.slow
def test_through_the_batcher(encoder):
    """Each text has its own answer and latency, and what was computed for it is counted."""
    encoder.warmup(progress=False)
    rows = encoder.tokenize(["sort", "an array", "of ones " * 30, "zeros"] * 5)
    steps: list[object] = []
    stream = through_batcher(encoder, rows, clients=3, step=steps.append)
    expected = [encoder.batcher.submit(*encoder.item(row)).result() for row in rows[:4]]
    np.testing.assert_allclose(stream.vectors, expected * 5, atol=1e-5)
    assert sorted(map(str, steps), key=int) == list(map(str, range(20)))
    assert 0 < min(stream.latencies_ms) <= max(stream.latencies_ms) <= stream.seconds * 1e3
    assert stream.real_elements == sum(map(len, rows))
    assert stream.computed_elements >= stream.real_elements
    assert 7 <= stream.calls <= 20
    assert stream.compiles == 0
