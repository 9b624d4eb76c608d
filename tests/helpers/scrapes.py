"""A function to register, and what a scrape gives."""

from __future__ import annotations

from cudagraph_jax import CUDAGraphManager, bucket_jit
from cudagraph_jax.testing import FakeCompiler
from tests.helpers.functions import GRID, double


def bucketed(config=GRID, **options):
    """A function that is counted; what it gives is zeros, for which nobody waits."""
    manager = CUDAGraphManager(config, compiler=FakeCompiler(memory_bytes=1000))
    return bucket_jit(double, in_axes=("batch seq",), manager=manager, **options)


def samples_of(registry, name="default", *, label="manager"):
    """The samples of one manager as `{"calls_total replay exact": 2.0}`, without times."""
    found = {}
    for metric in registry.collect():
        for sample in metric.samples:
            labels = dict(sample.labels)
            if labels.pop(label, None) == name and not sample.name.endswith("_created"):
                key = " ".join([sample.name.removeprefix("cudagraph_jax_"), *labels.values()])
                assert key not in found
                found[key] = sample.value
    return found
