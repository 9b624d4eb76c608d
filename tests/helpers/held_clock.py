"""A clock that stands still, and holds a batcher's worker for as long as a test wants."""

from __future__ import annotations

import threading


class HeldClock:
    """Seconds for tests: they pass when the test says so, and workers wait until it lets them."""

    def __init__(self) -> None:
        self.now = 0.0
        self._free = threading.Event()
        self._free.set()
        self._owner = threading.current_thread()

    def __call__(self) -> float:
        if threading.current_thread() is not self._owner:
            assert self._free.wait(60)
        return self.now

    def hold(self) -> None:
        """Has workers wait that ask for the time from now on."""
        self._free.clear()

    def release(self) -> None:
        """Lets them go on."""
        self._free.set()
