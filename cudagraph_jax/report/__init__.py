"""Snapshots and how they look: pure functions of what was measured."""
