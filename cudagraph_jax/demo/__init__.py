"""Semantic search over NumPy's documentation, served through `bucket_jit`."""

from cudagraph_jax.demo.encoder import Encoder
from cudagraph_jax.demo.planned.comparison import run_planned
from cudagraph_jax.demo.requirements import DemoError
from cudagraph_jax.demo.session import run

__all__ = ["DemoError", "Encoder", "run", "run_planned"]
