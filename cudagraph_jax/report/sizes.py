"""The sizes that calls had, the most asked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cudagraph_jax._base.text import escaped, table_fragment, text_table
from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.report.words import exact, part, things
from cudagraph_jax.shapes.ladder import Bucket

MOST_SIZES = 20
"""Sizes shown."""

_HEADER = ("batch", "seq_len", "calls", "part of all", "bucket", "padding")


def sizes_text(sizes: Mapping[Bucket, int], config: CUDAGraphConfig) -> str:
    """The most asked sizes, and in words what was left out; empty without any."""
    if not sizes:
        return ""
    return "\n".join(
        [_title(), text_table(_HEADER, _rows(sizes, config)), *filter(None, [_others(sizes)])]
    )


def sizes_html(sizes: Mapping[Bucket, int], config: CUDAGraphConfig) -> str:
    """The same as HTML."""
    if not sizes:
        return ""
    others = _others(sizes)
    note = f"<p>{escaped(others)}</p>" if others else ""
    return table_fragment(_title(), _HEADER, _rows(sizes, config)) + note


def _title() -> str:
    return "Most asked sizes"


def _sorted(sizes: Mapping[Bucket, int]) -> Sequence[tuple[Bucket, int]]:
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))


def _rows(sizes: Mapping[Bucket, int], config: CUDAGraphConfig) -> list[tuple[str, ...]]:
    total = sum(sizes.values())
    return [
        (
            str(size[0]),
            str(size[1]),
            exact(calls),
            part(calls / total) if total else "–",
            *_bucket(Bucket(*size), config),
        )
        for size, calls in _sorted(sizes)[:MOST_SIZES]
    ]


def _bucket(size: Bucket, config: CUDAGraphConfig) -> tuple[str, str]:
    """The bucket that the configuration pads a size to, and the padding in it."""
    if not config.should_use_cudagraph(*size):
        return "none: outside the limits", "–"
    bucket = config.bucket_for(*size)
    return str(bucket), part(1 - size.elements / bucket.elements)


def _others(sizes: Mapping[Bucket, int]) -> str:
    others = _sorted(sizes)[MOST_SIZES:]
    if not others:
        return ""
    calls = sum(count for _, count in others)
    return f"Left out: {things(len(others), 'size')} with {things(calls, 'call')}."
