"""A stand-in for the coordinator of a job that has one process."""

from __future__ import annotations


class Store:
    """A key-value store and a barrier, at which something may happen."""

    def __init__(self) -> None:
        self.told: dict[str, bytes] = {}
        self.at_barrier = lambda: None

    def key_value_set_bytes(self, key, value):
        self.told[key] = value

    def key_value_dir_get_bytes(self, folder):
        return [item for item in self.told.items() if item[0].startswith(f"{folder}/")]

    def key_value_delete(self, key):
        del self.told[key]

    def wait_at_barrier(self, name, timeout_in_ms):
        self.at_barrier()
