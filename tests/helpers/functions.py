"""Tiny functions of every kind that is served, and arguments for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cudagraph_jax import BucketedFunction, CUDAGraphConfig, bucket_jit

WIDTH = 3
VOCABULARY = 11

GRID = CUDAGraphConfig(capture_sizes=(1, 3, 4), capture_seq_lens=(2, 5), warmup_iterations=1)
"""Every limit is small, so that the whole grid compiles in a moment."""

CHAINED = CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(8, 16), warmup_iterations=1)
"""Of functions that pass arrays on to each other."""

ONE_BUCKET = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0)


def floats(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape, np.int32)


def flags(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5


def double(x):
    return x * 2


def total(inputs):
    """The specification's calls take one pytree."""
    return {"rows": jnp.sum(inputs["x"], axis=1), "each": inputs["x"] * inputs["scale"]}


def dense(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def embed(table, ids):
    return table[ids]


def attention(params, x, mask):
    scores = (x @ params["q"]) @ jnp.swapaxes(x, 1, 2)
    return jax.nn.softmax(jnp.where(mask[:, None, :], scores, -1e30)) @ x


def pooled(table, ids, *, mask):
    return jnp.sum(jnp.where(mask[..., None], table[ids], 0), 1) / jnp.sum(mask, 1)[:, None]


def recurrence(x):
    def step(state, row):
        state = jnp.tanh(state + row)
        return state, state

    return jnp.swapaxes(lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))[1], 0, 1)


def row_norms(x):
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def many(inputs, bias):
    x, lengths = inputs["x"], inputs["lengths"]
    here = jnp.arange(x.shape[1])[None] < lengths[:, None]
    return {"sum": jnp.sum(jnp.where(here, x, 0), 1), "each": (x + bias, here), "bias": bias * 2}


def transposed(x):
    return jnp.tanh(x[0] + x[1]).T, jnp.sum(x, axis=0)


def integers(ids, small):
    return ids * 2 + 1, small * small, ids > small


def logic(keep, other):
    return ~keep | other


def halves(x):
    return x * 2 + 1


def over_batch(x):
    return jnp.sum(x, axis=0)


def grand_total(x):
    return jnp.sum(x)


def running(x):
    return jnp.cumsum(x, axis=1)


def in_a_loop(wide, x):
    """`wide` as the state of a loop, which takes memory of its own once on every backend."""
    return lax.fori_loop(0, jnp.int32(x.sum() > 0), lambda _, state: state + 1, wide)


def big(x):
    """Needs 400 kB of temporary memory a row."""
    wide = jnp.broadcast_to(x[:, :1], (x.shape[0], 100_000)) * jnp.arange(100_000.0)
    return in_a_loop(wide, x)[:, ::50_000]


@dataclass(frozen=True)
class Kind:
    """One kind of function: how it is declared, and arguments of any sizes."""

    function: Callable[..., Any]
    in_axes: Any
    arguments: Callable[[int, int, int], tuple[Any, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5

    def bucketed(self, config: CUDAGraphConfig = GRID, **options: Any) -> BucketedFunction:
        return bucket_jit(
            self.function, in_axes=self.in_axes, config=config, **{**self.options, **options}
        )

    def plain(self, args: tuple[Any, ...], batch: int, seq: int) -> Any:
        """The plain function's answer at exactly this size; one compile instead of one per step."""
        mask = {"mask": np.ones((batch, seq), bool)} if "mask_argname" in self.options else {}
        return jax.jit(self.function)(*args, **mask)


PARAMS = {"w": floats(1, WIDTH, 2), "b": floats(2, 2), "q": floats(3, WIDTH, WIDTH)}
TABLE = floats(4, VOCABULARY, 2)

KINDS = {
    "dense": Kind(
        dense, (None, "batch seq ..."), lambda seed, b, s: (PARAMS, floats(seed, b, s, WIDTH))
    ),
    "attention": Kind(
        attention,
        (None, "batch seq ...", "batch seq"),
        # The first position is always real: a softmax over nothing is nobody's answer.
        lambda seed, b, s: (
            PARAMS,
            floats(seed, b, s, WIDTH),
            flags(seed, b, s) | (np.arange(s) == 0),
        ),
    ),
    "masked pooling": Kind(
        pooled,
        (None, "batch seq"),
        lambda seed, b, s: (TABLE, tokens(seed, b, s)),
        {"mask_argname": "mask"},
    ),
    "lookup": Kind(embed, (None, "batch seq"), lambda seed, b, s: (TABLE, tokens(seed, b, s))),
    "scan": Kind(recurrence, "batch seq ...", lambda seed, b, s: (floats(seed, b, s, 2),)),
    "row reduction": Kind(row_norms, ("batch _",), lambda seed, b, s: (floats(seed, b, WIDTH),)),
    "pytrees": Kind(
        many,
        ({"x": "batch seq", "lengths": "batch"}, None),
        lambda seed, b, s: (
            {"x": floats(seed, b, s), "lengths": tokens(seed, b) % (s + 1)},
            np.float32(0.5),
        ),
    ),
    "batch last": Kind(transposed, ("_ seq batch",), lambda seed, b, s: (floats(seed, 2, s, b),)),
    "integers": Kind(
        integers,
        ("batch seq", "batch seq"),
        lambda seed, b, s: (tokens(seed, b, s), tokens(seed + 1, b, s).astype(np.int8)),
        tolerance=0,
    ),
    "bools": Kind(
        logic, "batch seq", lambda seed, b, s: (flags(seed, b, s), flags(seed + 1, b, s)), {}, 0
    ),
    "bfloat16": Kind(
        halves,
        ("batch seq",),
        lambda seed, b, s: (floats(seed, b, s).astype(jnp.bfloat16),),
        tolerance=2**-6,
    ),
    "batch summed away": Kind(over_batch, ("batch seq",), lambda seed, b, s: (floats(seed, b, s),)),
    "one number": Kind(grand_total, ("batch seq",), lambda seed, b, s: (floats(seed, b, s),)),
    "running sum": Kind(
        running,
        ("batch seq",),
        lambda seed, b, s: (floats(seed, b, s),),
        {"out_axes": "batch seq", "pad_values": "edge"},
    ),
}


def stats_of(counting: Any) -> dict[str, Any]:
    """The statistics of a function, manager or registry."""
    return counting.stats()


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Same structure, shapes and dtypes, and the same values to within `tolerance`."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (found, expected)]
    assert structures[0] == structures[1]
    for have, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert have.shape == want.shape
        assert have.dtype == want.dtype
        np.testing.assert_allclose(
            np.asarray(have, np.float64), np.asarray(want, np.float64), tolerance, tolerance
        )
