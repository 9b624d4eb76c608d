"""Sizes and shapes: ladders, axes, padding. Nothing here ever compiles."""
