"""The package's one logger: captures and evictions at INFO, decisions at DEBUG.

It has no handler of its own, not even `logging.NullHandler`: where the application configures
nothing, Python prints what went wrong in a worker thread to stderr, and drops the rest.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("cudagraph_jax")
