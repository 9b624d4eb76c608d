"""Routes: remembered until an entry is dropped, and not without end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from cudagraph_jax.graphs.route import MAX_ROUTES, Routes

FITS: Any = cast(Any, SimpleNamespace(pads_nothing=True))
PADS: Any = cast(Any, SimpleNamespace(pads_nothing=False))


def test_a_route_decided_before_a_drop_is_not_remembered():
    """A thread that decided before routes were forgotten cannot bring an old one back."""
    routes = Routes()
    before = routes.draft()
    routes.forget_routes()
    before.add(FITS, key="key", lead="lead")
    assert not routes.table
    assert not routes.exact


def test_only_a_route_that_pads_nothing_is_found_by_one_shape():
    """One array's shape decides where the compiled function checks all the others."""
    routes = Routes()
    routes.draft().add(FITS, key="fits", lead=(4, 8))
    routes.draft().add(PADS, key="pads", lead=(3, 8))
    routes.draft().add(FITS, key="bound", lead=None)
    assert routes.table == {"fits": FITS, "pads": PADS, "bound": FITS}
    assert routes.exact == {(4, 8): FITS}


def test_memory_is_bounded():
    """Beyond the limit all routes are forgotten and remembering starts anew."""
    routes = Routes()
    for key in range(MAX_ROUTES + 1):
        routes.draft().add(FITS, key=key, lead=key)
    assert list(routes.table) == [MAX_ROUTES]
    assert list(routes.exact) == [MAX_ROUTES]
