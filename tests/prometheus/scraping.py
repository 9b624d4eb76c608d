"""A function to register, and what a scrape gives."""

from __future__ import annotations

from cudagraph_jax import bucket_jit
from tests.graphs.functions import GRID, double


def bucketed(config=GRID, **options):
    return bucket_jit(double, in_axes=("batch seq",), config=config, **options)


def samples_of(registry, name="default"):
    """The samples of one manager as `{"calls_total replay exact": 2.0}`, without times."""
    found = {}
    for metric in registry.collect():
        for sample in metric.samples:
            labels = dict(sample.labels)
            if labels.pop("manager") == name and not sample.name.endswith("_created"):
                key = " ".join([sample.name.removeprefix("cudagraph_jax_"), *labels.values()])
                assert key not in found
                found[key] = sample.value
    return found
