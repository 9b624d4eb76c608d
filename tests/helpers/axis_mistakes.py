"""Models of further kinds of axes that padding breaks, and the same that it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cudagraph_jax import CUDAGraphConfig


def standardised(x, real):
    """Less a mean, by a deviation: of padding, too, where that counts as real."""
    count = real.sum(-1, keepdims=True)
    mean = jnp.where(real, x, 0).sum(-1, keepdims=True) / count
    variance = jnp.where(real, jnp.square(x - mean), 0).sum(-1, keepdims=True) / count
    return (x - mean) / jnp.sqrt(variance + 1e-3)


def mean(x, real):
    return jnp.where(real, x, 0).sum(-1) / real.sum(-1)


def attention(x, real):
    """Softmax over scores of which some may be padding."""
    scores = jnp.where(real[..., None, :], x[..., :, None] * x[..., None, :], -jnp.inf)
    return jnp.einsum("...qk,...k->...q", jax.nn.softmax(scores), x)


def from_the_end(x, real):
    """Positions that are counted from the last one that is real."""
    return x + real.sum(-1, keepdims=True) - 1 - jnp.arange(x.shape[-1])


def best(x, real):
    return jnp.argmax(jnp.where(real, x, -jnp.inf), axis=-1)


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
    return real if is_right else jnp.ones_like(real)


# Compiled as a whole, where operation by operation each is compiled for every size.
def _named(act, *, is_right):
    def model(images, *, mask):
        columns = jnp.swapaxes(mask, 1, 2)
        return act(jnp.swapaxes(images, 1, 2), _counted(columns, is_right))

    return jax.jit(model)


def _twice(act, *, is_right):
    def model(pairs, *, mask):
        real = mask[:, :, None] & mask[:, None, :]
        return act(pairs, _counted(real, is_right))

    return jax.jit(model)


def _follows(act, *, is_right):
    def model(x, edges, *, mask):
        real = jnp.arange(edges.shape[1]) <= mask.sum(1, keepdims=True)
        return x, act(edges, _counted(real, is_right))

    return jax.jit(model)


def _masks(act, *, is_right):
    def model(query, keys, *, src_mask, row_mask):
        real = (src_mask & row_mask[:, None])[:, None, :]
        found = act(jnp.swapaxes(keys, 1, 2), _counted(real & jnp.ones((3, 1), bool), is_right))
        return query, found

    return jax.jit(model)


def _in_front(act, *, is_right):
    def model(prompts, *, mask):
        found = act(prompts[:, ::-1], _counted(mask[:, ::-1], is_right))
        return found if found.ndim == 1 else found[:, ::-1]

    return jax.jit(model)


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
