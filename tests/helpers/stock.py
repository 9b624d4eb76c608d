"""A store as a command line meets it: entries that were never executables."""

from __future__ import annotations

from pathlib import Path

from cudagraph_jax.store import GraphStore, Identity

NOW = 1_000_000.0
HOST: Identity = {
    "platform": "gpu",
    "device_kind": ["NVIDIA H100"],
    "jax": "0.12.0",
    "jaxlib": "0.12.1",
}
EMBED: Identity = {
    **HOST,
    "name": "embed",
    "bucket": "8x128",
    "known_by": "fingerprint",
    "fingerprint": "v3",
    "code": "0123456abcdef012",
}
EMBED_LARGE: Identity = {**EMBED, "bucket": "16x128"}
RANK: Identity = {
    **HOST,
    "name": "rank",
    "bucket": "8x128",
    "known_by": "stablehlo",
    "stablehlo": "fedcba9876543210",
    "platform": "cpu",
    "device_kind": ["cpu"],
}
IDENTITIES = (EMBED, EMBED_LARGE, RANK)


def stocked(path: Path, *, key: bytes | None = None, now: float = NOW) -> GraphStore:
    """A store with three entries, each used an hour after the one before."""
    times = iter(now + 3600.0 * (number // 2) for number in range(2 * len(IDENTITIES)))
    store = GraphStore(path, key=key, clock=lambda: next(times))
    for number, identity in enumerate(IDENTITIES):
        store.put(identity, bytes([number]) * 2950)
    return store


def files(path: Path) -> dict[str, bytes]:
    """What a directory holds."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def spoil(path: Path, identity_file: str, at: int = -40) -> None:
    """Flips a bit of an entry."""
    data = bytearray((path / identity_file).read_bytes())
    data[at] ^= 1
    (path / identity_file).write_bytes(data)
