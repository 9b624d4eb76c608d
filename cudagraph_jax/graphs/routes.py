"""Remembered routes: what a call of known shapes needs, without deciding again."""

from __future__ import annotations

from collections.abc import Hashable

from cudagraph_jax.graphs.route import Route

MAX_ROUTES = 1 << 14
"""Shapes remembered by one function; beyond that it starts anew (some 10 MB)."""

RouteTable = dict[Hashable, Route]


class Routes:
    """The routes of one caller; valid until an entry is dropped or the mode changes.

    `table` is read without a lock. Forgetting swaps the dictionary, so that a thread that decided
    before cannot add its route to the one in use: take `table` first, decide, then `add`.

    Attributes:
        table: The routes in use, by a key of the caller's.
    """

    __slots__ = ("__weakref__", "table")

    def __init__(self) -> None:
        self.table: RouteTable = {}

    def forget_routes(self) -> None:
        """Decides every call anew from now on."""
        self.table = {}

    def add(self, table: RouteTable, key: Hashable, route: Route) -> None:
        """Remembers `route` in `table`, which was `self.table` before the decision."""
        if len(table) >= MAX_ROUTES:
            self.forget_routes()
            table = self.table
        table[key] = route
