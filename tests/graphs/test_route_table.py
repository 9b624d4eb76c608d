"""Routes: remembered until an entry is dropped, and not without end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from cudagraph_jax.graphs.route import MAX_ROUTES, Routes

FITS: Any = cast(
    Any,
    SimpleNamespace(pads_nothing=True, sizes_in_arrays=True, lead_decides=True),
)
PADS: Any = cast(
    Any,
    SimpleNamespace(pads_nothing=False, sizes_in_arrays=True, lead_decides=True),
)
NESTED: Any = cast(
    Any, SimpleNamespace(pads_nothing=False, sizes_in_arrays=False, lead_decides=True)
)
FLOAT = np.dtype(np.float32)


def on_device(*shape):
    """What has a shape and is no NumPy array."""
    return SimpleNamespace(shape=shape, dtype=FLOAT)


def on_host(*shape):
    return np.empty(shape, FLOAT)


def test_a_route_decided_before_a_drop_is_not_remembered():
    """A thread that decided before routes were forgotten cannot bring an old one back."""
    routes = Routes()
    before = routes.draft()
    routes.forget_routes()
    before.add(FITS, key="key", lead=on_host(4, 8))
    assert not routes.table
    assert not routes.exact
    assert not routes.numpy


def test_a_route_is_found_by_one_array_where_that_decides():
    """By its shape where the compiled function checks the others; with its dtype in NumPy."""
    routes = Routes()
    routes.draft().add(FITS, key="fits", lead=on_device(4, 8))
    routes.draft().add(PADS, key="pads", lead=on_host(3, 8))
    routes.draft().add(PADS, key="copied", lead=on_device(2, 8))
    routes.draft().add(NESTED, key="nested", lead=on_host(1, 8))
    routes.draft().add(FITS, key="bound", lead=None)
    assert set(routes.table) == {"fits", "pads", "copied", "nested", "bound"}
    assert routes.exact == {(4, 8): FITS}
    assert routes.numpy == {((3, 8), FLOAT): PADS}


def test_memory_is_bounded():
    """Beyond the limit all routes are forgotten and remembering starts anew."""
    routes = Routes()
    for key in range(MAX_ROUTES + 1):
        routes.draft().add(FITS, key=key, lead=on_device(key))
    assert list(routes.table) == [MAX_ROUTES]
    assert list(routes.exact) == [(MAX_ROUTES,)]
