"""Executables on disk: bytes that come back whole or not at all. Knows no JAX and no pickle."""

from cudagraph_jax._base.text import Json
from cudagraph_jax.store.folder import Files
from cudagraph_jax.store.identity import Difference, Identity
from cudagraph_jax.store.outcomes import (
    Beside,
    Checked,
    Miss,
    MissReason,
    Near,
    Pruned,
    Record,
    Stored,
)
from cudagraph_jax.store.store import GraphStore

__all__ = [
    "Beside",
    "Checked",
    "Difference",
    "Files",
    "GraphStore",
    "Identity",
    "Json",
    "Miss",
    "MissReason",
    "Near",
    "Pruned",
    "Record",
    "Stored",
]
