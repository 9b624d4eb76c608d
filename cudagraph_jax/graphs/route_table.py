"""Remembered routes: what a call of known shapes needs, without deciding again."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import NamedTuple

from cudagraph_jax._base.fork import forkable_lock, put_right_in_child
from cudagraph_jax.graphs.route import Route

MAX_ROUTES = 1 << 14
"""Shapes remembered by one function; beyond that it starts anew (some 10 MB)."""

RouteTable = dict[Hashable, Route]


class Routes:
    """The routes of one caller; valid until an entry is dropped or the mode changes.

    Both tables are read without a lock. Forgetting swaps the dictionaries, so that a thread that
    decided before cannot add its route to those in use: take a `draft` first, decide, then `add`.

    Attributes:
        table: Routes by the shapes and dtypes of all bucketed arrays.
        exact: Routes that pad nothing, by the shape of the array that carries the sizes: the
            compiled function refuses other arrays that do not fit it.
    """

    __slots__ = ("__weakref__", "exact", "table")

    def __init__(self) -> None:
        self.forget_routes()

    def forget_routes(self) -> None:
        """Decides every call anew from now on."""
        self.table: RouteTable = {}
        self.exact: RouteTable = {}

    def draft(self) -> Draft:
        """Where the route of a decision that is yet to be taken may be added."""
        return Draft(self.table, self.exact)


class Draft(NamedTuple):
    """The tables that were in use before a decision."""

    table: RouteTable
    exact: RouteTable

    def add(self, route: Route, *, key: Hashable, lead: Hashable | None) -> None:
        """Remembers `route`.

        Args:
            route: The route of a call.
            key: The call's key in `table`.
            lead: Its key in `exact`; None where it has none.
        """
        for table in self:
            if len(table) >= MAX_ROUTES:
                table.clear()
        self.table[key] = route
        if lead is not None and route.pads_nothing:
            self.exact[lead] = route


class Watchers:
    """All the routes that have to be forgotten when an entry is dropped; held weakly."""

    def __init__(self) -> None:
        self._lock = forkable_lock()
        self._routes: weakref.WeakSet[Routes] = weakref.WeakSet()
        put_right_in_child(self)

    def add(self, routes: Routes) -> None:
        """Forgets `routes` too, from now on."""
        with self._lock:
            self._routes.add(routes)

    def forget(self) -> None:
        """Decides every call anew from now on."""
        with self._lock:
            routes = list(self._routes)
        for watcher in routes:
            watcher.forget_routes()

    def after_fork(self) -> None:
        """Has a forked child decide every call anew, so that it is told that it is one."""
        self.forget()
