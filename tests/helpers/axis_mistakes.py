"""Models of further kinds of axes that padding breaks, and the same that it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cudagraph_jax import CUDAGraphConfig
from tests.helpers.by_numpy import by_numpy, softmax, xp


def standardised(x, real):
    """Less a mean, by a deviation: of padding, too, where that counts as real."""
    count = real.sum(-1, keepdims=True)
    mean = xp(x).where(real, x, 0).sum(-1, keepdims=True) / count
    variance = xp(x).where(real, (x - mean) ** 2, 0).sum(-1, keepdims=True) / count
    return (x - mean) / (variance + 1e-3) ** 0.5


def mean(x, real):
    return xp(x).where(real, x, 0).sum(-1) / real.sum(-1)


def attention(x, real):
    """Softmax over scores of which some may be padding."""
    scores = xp(x).where(real[..., None, :], x[..., :, None] * x[..., None, :], -np.inf)
    return xp(x).einsum("...qk,...k->...q", softmax(scores), x)


def from_the_end(x, real):
    """Positions that are counted from the last one that is real."""
    return x + real.sum(-1, keepdims=True) - 1 - xp(x).arange(x.shape[-1])


def best(x, real):
    return xp(x).where(real, x, -np.inf).argmax(-1)


ACTS = (standardised, mean, attention, from_the_end, best)
"""What goes wrong where padding counts as real, each along the last dimension."""


class Kind(NamedTuple):
    """A kind of axis.

    Attributes:
        axis: What messages call the axis whose padding counts.
        options: Of an assertion of the testing kit, for both models.
        model: Gives the model of an act; `is_right`: the padding does not count as real.
    """

    axis: str
    options: dict[str, Any]
    model: Callable[..., Callable[..., Any]]


def _counted(real, is_right):
    return real if is_right else xp(real).ones_like(real)


def _named(act, *, is_right):
    def model(images, *, mask):
        columns = mask.swapaxes(1, 2)
        return act(images.swapaxes(1, 2), _counted(columns, is_right))

    return by_numpy(model)


def _twice(act, *, is_right):
    def model(pairs, *, mask):
        real = mask[:, :, None] & mask[:, None, :]
        return act(pairs, _counted(real, is_right))

    return by_numpy(model)


def _follows(act, *, is_right):
    def model(x, edges, *, mask):
        real = xp(edges).arange(edges.shape[1]) <= mask.sum(1, keepdims=True)
        return x, act(edges, _counted(real, is_right))

    return by_numpy(model)


def _masks(act, *, is_right):
    def model(query, keys, *, src_mask, row_mask):
        real = (src_mask & row_mask[:, None])[:, None, :]
        found = act(keys.swapaxes(1, 2), _counted(real & np.ones((3, 1), bool), is_right))
        return query, found

    return by_numpy(model)


def _in_front(act, *, is_right):
    def model(prompts, *, mask):
        found = act(prompts[:, ::-1], _counted(mask[:, ::-1], is_right))
        return found if found.ndim == 1 else found[:, ::-1]

    return by_numpy(model)


KINDS = {
    "a named axis": Kind(
        "height",
        {
            "in_axes": "batch height width",
            "mask_argname": "mask",
            "config": CUDAGraphConfig(
                capture_sizes=(2,), capture_axes={"height": (1, 4), "width": (2,)}
            ),
        },
        _named,
    ),
    "an axis twice": Kind(
        "node",
        {
            "in_axes": "batch node node",
            "mask_argname": "mask",
            "config": CUDAGraphConfig(capture_sizes=(2,), capture_axes={"node": (1, 4)}),
        },
        _twice,
    ),
    "a length that follows": Kind(
        "the sequence",
        {
            "in_axes": ("batch seq", "batch seq+1"),
            "mask_argname": "mask",
            "config": CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(1, 4)),
        },
        _follows,
    ),
    "a mask over its own axes": Kind(
        "src",
        {
            "in_axes": ("batch tgt", "batch src _"),
            "mask_argname": {"src_mask": "batch src", "row_mask": "batch"},
            "config": CUDAGraphConfig(
                capture_sizes=(2,), capture_axes={"src": (1, 4), "tgt": (2,)}
            ),
        },
        _masks,
    ),
    "rows padded in front": Kind(
        "prompt",
        {
            "in_axes": "batch prompt",
            "mask_argname": "mask",
            "pad_side": "left",
            "config": CUDAGraphConfig(capture_sizes=(2,), capture_axes={"prompt": (1, 4)}),
        },
        _in_front,
    ),
}
