"""Typical uses of the public names, which type checkers read and nothing runs.

`make lint` has mypy and pyright check that the types are these, and that what is wrong is refused.
"""

from __future__ import annotations

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np

import cudagraph_jax
from cudagraph_jax import (
    Bucket,
    BucketedFunction,
    BucketPlan,
    CUDAGraphConfig,
    CUDAGraphEntry,
    CUDAGraphManager,
    CUDAGraphMode,
    CUDAGraphRegistry,
    Explanation,
    GraphStore,
    Ladder,
    Report,
    WarmupReport,
    bucket_jit,
    no_compiles,
    plan_buckets,
    plan_for_batcher,
)
from cudagraph_jax.report.command_buffers import Inspection
from cudagraph_jax.testing import assert_bucketing_preserves

config = CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(16, 32), on_miss="background")
ids = np.ones((3, 5), np.int32)


@bucket_jit(in_axes=(None, "batch seq"), config=config)
def embed(params: jax.Array, ids: jax.Array | np.ndarray, *, scale: float = 1.0) -> jax.Array:
    """Keeps its parameters and its result."""
    return params[jnp.asarray(ids)] * scale


def pairs(x: np.ndarray) -> tuple[jax.Array, dict[str, int]]:
    """Some function."""
    return jnp.asarray(x), {}


def calls(params: jax.Array) -> None:
    """A bucketed function has the function's parameters and result."""
    assert_type(embed(params, ids), jax.Array)
    assert_type(embed(params, ids, scale=2.0), jax.Array)
    plain = bucket_jit(pairs, in_axes="batch seq", unpad=("none", None))
    assert_type(plain(ids), tuple[jax.Array, dict[str, int]])

    embed(params, "text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    embed(params)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    embed(params, ids, size=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    bucket_jit(pairs)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    CUDAGraphConfig(on_miss="never")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    CUDAGraphConfig((1, 2))  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]


@bucket_jit(in_axes=("batch seq",), mask_argname="mask", config=config)
def masked(x: jax.Array, *, mask: jax.Array) -> jax.Array:
    """Gets its mask from the library."""
    return x * mask


def calls_without_a_mask(x: jax.Array) -> None:
    """Who calls a function that takes a mask passes none."""
    assert_type(masked(x), jax.Array)
    unmasked = bucket_jit(pairs, in_axes="batch seq", mask_argname=None)
    assert_type(unmasked(ids), tuple[jax.Array, dict[str, int]])


def operated(params: jax.Array) -> None:
    """What is done with a bucketed function beside calling it."""
    assert_type(embed.warmup(params, ids), WarmupReport)
    assert_type(embed.warmup(params, ids, progress=False, workers=2), WarmupReport)
    assert_type(embed.explain(params, ids), Explanation)
    assert_type(embed.stats(), dict[str, Any])
    assert_type(embed.report("cache.html"), Report)
    assert_type(embed.replan(max_graphs=8, headroom=0.0), BucketPlan)
    assert_type(embed.manager, CUDAGraphManager)
    assert_type(embed.registry, CUDAGraphRegistry)
    embed.seal()
    with no_compiles():
        embed(params, ids)


def taken(function: BucketedFunction[[np.ndarray], jax.Array]) -> jax.Array:
    """A bucketed function as an argument."""
    return function(ids)


def specified() -> None:
    """The specification's classes."""
    with CUDAGraphManager(config) as manager:
        manager.mode = CUDAGraphMode.NONE
        assert_type(manager.get_mode_for_batch(3, 5), CUDAGraphMode)
        assert_type(manager.execute_or_capture(3, 5, pairs, ids), Any)
        assert_type(manager.capture_graph(3, 5, pairs, ids), CUDAGraphEntry | None)
    registry = CUDAGraphRegistry(config)
    entry = registry.capture(4, 8, pairs, (4, 8), (4, 8))
    assert_type(entry, CUDAGraphEntry)
    assert_type(entry.key, tuple[int, int])
    assert_type(entry.memory_bytes, int | None)
    assert_type(entry.inspect(), Inspection)
    assert_type(registry.get(4, 8), CUDAGraphEntry | None)
    assert_type(registry.remove(4, 8), bool)


def planned() -> None:
    """Ladders, plans and configurations."""
    assert_type(Ladder.vllm(256).fit(3), int | None)
    plan = plan_buckets([(1, 10), (2, 20)], max_graphs=4, headroom=0.25)
    assert_type(plan, BucketPlan)
    assert_type(plan.expected_waste, float)
    assert_type(plan_for_batcher([10, 20], max_graphs=4, cost={(1, 8): 0.1}), BucketPlan)
    assert_type(CUDAGraphConfig.from_plan(plan, on_miss="eager"), CUDAGraphConfig)
    assert_type(config.buckets(), tuple[Bucket, ...])
    assert_type(CUDAGraphConfig.from_dict(config.to_dict()), CUDAGraphConfig)
    plan_buckets([1, 2])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def kept() -> None:
    """Stores, and tests of a function."""
    store = GraphStore("graphs", mode="ro", key=b"0123456789abcdef")
    assert_type(len(store), int)
    bucket_jit(pairs, in_axes="batch seq", store=store, fingerprint="v1")
    assert_bucketing_preserves(pairs, in_axes="batch seq")
    GraphStore("graphs", mode="w")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    cudagraph_jax.nothing  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018
