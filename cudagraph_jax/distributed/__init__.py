"""Functions of several processes, for which process 0 decides: order, bucket and data."""

from cudagraph_jax.distributed.leading import Led, follow, lead

__all__ = ["Led", "follow", "lead"]
