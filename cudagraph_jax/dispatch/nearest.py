"""The captured bucket that is nearest to a call, and what it differs in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.program.call import Call, argument_leaf_names
from cudagraph_jax.program.variant import AbstractLeaf
from cudagraph_jax.shapes.ladder import Bucket


def nearest_entry(entries: Sequence[CUDAGraphEntry], call: Call, bucket: Bucket) -> str:
    """The entry of the call's function that is nearest to `bucket`, in words; empty without one.

    The fewest differing fields come first, then the nearest size.

    Args:
        entries: What is captured.
        call: The call.
        bucket: What the call is padded to.
    """
    candidates = [
        (list(_differences(entry, call, bucket)), entry)
        for entry in entries
        if entry.variant.function == call.variant.function
    ]
    if not candidates:
        return ""
    differences, entry = min(
        candidates,
        key=lambda found: (len(found[0]), abs(found[1].bucket.elements - bucket.elements)),
    )
    return f"the nearest captured bucket is {entry.bucket}, with {' and '.join(differences)}"


def _differences(entry: CUDAGraphEntry, call: Call, bucket: Bucket) -> Iterator[str]:
    for name, has, needs in (
        ("batch", entry.batch_size, bucket.batch_size),
        ("seq_len", entry.seq_len, bucket.seq_len),
    ):
        if has != needs:
            yield f"{name} {has}, not {needs}"
    for captured, given in zip_longest(entry.variant.statics, call.variant.statics):
        if captured != given:
            yield f"static argument {_static(captured)}, not {_static(given)}"
    if entry.variant.structure != call.variant.structure:
        yield "another pytree of arguments"
        return
    names = argument_leaf_names(entry.program.argument_names, call.args, call.kwargs)
    for name, captured_leaf, leaf in zip(
        names, entry.variant.leaves, call.variant.leaves, strict=True
    ):
        if captured_leaf != leaf:
            yield f"{name} of {_field(captured_leaf, leaf)}"


def _static(static: tuple[str, type, object] | None) -> str:
    return "absent" if static is None else f"{static[0]}={static[2]!r}"


def _field(captured: AbstractLeaf, given: AbstractLeaf) -> str:
    if captured.dtype != given.dtype:
        return f"dtype {captured.dtype}, not {given.dtype}"
    if captured.shape != given.shape:
        return f"shape {captured}, not {given}"
    if captured.weak_type != given.weak_type:
        return "a weak type" if captured.weak_type else "a fixed type"
    return "another sharding"
