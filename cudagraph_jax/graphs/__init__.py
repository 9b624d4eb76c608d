"""Captured buckets: what each one is, how calls run through it, and proofs about it."""
