"""Captured buckets, found by size."""

from __future__ import annotations

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.program.variant import Variant
from cudagraph_jax.shapes.ladder import Bucket


class FoundBySize:
    """The part of a registry that finds what it holds.

    Attributes:
        config: The grid that sizes are padded to.
    """

    config: CUDAGraphConfig

    def entries(self) -> list[CUDAGraphEntry]:
        """A snapshot of all entries, in the order of their capture."""
        raise NotImplementedError

    def find_larger(self, sizes: Bucket, variant: Variant) -> CUDAGraphEntry | None:
        """The entry with the fewest elements that holds `sizes`, of the same variant.

        Without `capture_seq_lens` the sequence is not padded, so only its own length holds it.
        """
        pads_seq = self.config.capture_seq_lens is not None
        entries = [entry for entry in self.entries() if entry.variant == variant]
        holding = [entry for entry in entries if entry.bucket.holds(sizes, pads_seq=pads_seq)]
        return min(holding, key=lambda entry: entry.bucket.elements, default=None)

    def get(
        self, batch_size: int, seq_len: int, *, variant: Variant | None = None
    ) -> CUDAGraphEntry | None:
        """The entry of this size, else of the bucket it is padded to, else None.

        Args:
            batch_size: Rows of the request.
            seq_len: Sequence length of the request.
            variant: Which one of several; None: the one captured last.
        """
        for bucket in (Bucket(batch_size, seq_len), self.config.bucket_for(batch_size, seq_len)):
            if entries := self.at(bucket, variant=variant):
                return entries[-1]
        return None

    def at(self, bucket: Bucket, *, variant: Variant | None = None) -> list[CUDAGraphEntry]:
        """All entries of exactly this bucket, the one captured last at the end."""
        held = (entry for entry in self.entries() if entry.bucket == bucket)
        return [entry for entry in held if variant in (None, entry.variant)]

    def has(self, batch_size: int, seq_len: int, *, variant: Variant | None = None) -> bool:
        """Whether `get` would find an entry."""
        return self.get(batch_size, seq_len, variant=variant) is not None
