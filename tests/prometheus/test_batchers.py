"""The counts of batchers as Prometheus metrics."""

import gc

import pytest

from cudagraph_jax import Batcher, ConfigError
from cudagraph_jax.prometheus import register
from tests.helpers.batched import Doubling, row
from tests.helpers.scrapes import samples_of


def test_what_is_exported(registry):
    """Items by outcome, calls by bucket, elements, what waits, and two histograms."""
    doubling = Doubling()
    with Batcher(doubling.function) as batcher:
        registration = register(batcher, name="a", registry=registry)
        batcher.map([row(1)] * 3)
        with pytest.raises(TypeError):
            batcher.submit([1.0])
    found = samples_of(registry, "a", label="batcher")
    calls = batcher.stats()["calls"]["4x8"]
    assert found["batcher_items_total answered"] == 3
    assert found["batcher_items_total refused"] == 1
    assert found["batcher_calls_total 4x8"] == calls
    assert found["batcher_real_elements_total"] == 9
    assert found["batcher_computed_elements_total"] == 32 * calls
    assert found["batcher_waiting"] == 0
    assert found["batcher_queue_seconds_count"] == found["batcher_service_seconds_count"] == 3
    registration.unregister()
    assert samples_of(registry, "a", label="batcher") == {}
    assert batcher.figures.queued.observers == []


def test_managers_and_batchers_beside_each_other(registry):
    """A manager and a batcher may have one name; two batchers may not; none is kept alive."""
    doubling = Doubling()
    batcher = Batcher(doubling.function)
    register(doubling.function.manager, registry=registry)
    register(batcher, registry=registry)
    with pytest.raises(ConfigError, match="give each batcher a name"):
        register(Batcher(doubling.function), registry=registry)
    del batcher
    gc.collect()
    assert samples_of(registry, label="batcher") == {}
    assert samples_of(registry)["graphs"] == 1
