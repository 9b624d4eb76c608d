"""Captured buckets: compiled, held, decided upon and called."""
