"""Counting XLA's compiles by what JAX reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax.xla.compiles import (
    CACHE_HIT_EVENT,
    COMPILE_EVENT,
    CompileCounter,
    compiles_are_reported,
)


@pytest.fixture
def function():
    """A jitted function that nothing has compiled."""
    return jax.jit(lambda x: jnp.sin(x) * 3)


def test_compiles_count(function):
    """A new size is one compile; the same size again is none."""
    with CompileCounter() as counter:
        function(np.ones(3, np.float32))
        assert counter.compiles == 1
        function(np.ones(3, np.float32))
        assert counter.compiles == 1
        function(np.ones(4, np.float32))
    assert counter.compiles == 2


def test_nothing_is_counted_outside(function):
    """What is compiled before entering or after leaving is not counted."""
    function(np.ones(3, np.float32))
    with CompileCounter() as counter:
        function(np.ones(3, np.float32))
    function(np.ones(4, np.float32))
    assert counter.compiles == 0


def test_listeners_are_gone_after_an_error(function):
    """An error inside does not leave the counter counting."""
    counter = CompileCounter()
    with pytest.raises(KeyError), counter:
        raise KeyError
    function(np.ones(3, np.float32))
    assert counter.events == 0


def test_reads_from_the_persistent_cache():
    """What JAX reports both as a compile and as a cache hit is no compile."""
    with CompileCounter() as counter:
        jax.monitoring.record_event_duration_secs(COMPILE_EVENT, 0.1)
        jax.monitoring.record_event(CACHE_HIT_EVENT)
        jax.monitoring.record_event("/another/event")
        jax.monitoring.record_event_duration_secs("/another/duration", 0.1)
    assert (counter.events, counter.compiles) == (1, 0)


def test_reported():
    """This JAX reports its compiles."""
    assert compiles_are_reported()
