"""Runs of a bucket without a request, so that its command buffers are recorded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax._base.fork import use_jax
from cudagraph_jax._base.log import logger
from cudagraph_jax._base.text import error_text
from cudagraph_jax._base.worker import LeftBehindError, run_aside
from cudagraph_jax.errors import CaptureError, DistributedError, InputShapeError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.replay_counts import Fit
from cudagraph_jax.graphs.route import Route
from cudagraph_jax.graphs.trial import behind_no_cut, unshared
from cudagraph_jax.program.call import AbstractLeaf, Call
from cudagraph_jax.program.padded import Padded
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.axes import LeafAxes
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import real_index
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.shardings import is_readable

LONG_S = 10.0
"""A run that takes longer is told of; once more after twice that, and so on."""

Told = Callable[[CUDAGraphEntry, float], None]


def run_idle(
    entry: CUDAGraphEntry,
    iterations: int,
    *,
    call: Call | None = None,
    tell: Told = lambda entry, seconds: None,
    looks_on: Callable[[float], None] = lambda seconds: None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Runs `entry` on rows that a request could have, and waits; records no replay.

    Those are the rows of `call`, cut to the bucket or padded like a request's, under the mask that
    such a request has. Where its arrays are shapes alone, the bucket is padding throughout, and
    the mask says so: it is False everywhere.

    It runs in a thread of its own, so that an interrupt and the end of the process need not wait
    for a function whose loop does not end.

    Args:
        entry: What to run.
        iterations: How often. XLA records a command buffer on the second run (docs/xla.md).
        call: A call of the entry's variant; None: what is known of those that captured it, which
            is the arrays that they passed through, while those are alive.
        tell: Told of a run that takes long, after it was logged, and how many seconds it has taken.
        looks_on: Called every 50 ms of a run with how many seconds it has taken; what it raises
            leaves the run behind.
        clock: Seconds.

    Raises:
        CaptureError: A run failed, or was left behind when the process exited.
        InputShapeError: A PRNG key is given as a shape.
        DistributedError: What `looks_on` raises.
    """
    use_jax()
    rows = idle_call(entry.program, entry.program.example if call is None else call, entry.bucket)
    # Nothing is trimmed, so nobody asks the function how long its outputs are for no rows at all.
    outputs = entry.outputs._replace(follows=False)
    route = entry.route_for(rows, fit=Fit.PADDED, outputs=outputs)
    run = partial(_timed, entry.program, route, rows)
    for _ in range(iterations):
        watch = _Watch(entry, rows.sizes, tell, looks_on)
        try:
            seconds = run_aside(run, name="cudagraph-jax-run", looks_on=watch, clock=clock)
        except DistributedError:
            raise
        except LeftBehindError:
            raise CaptureError(
                f"{entry.bucket} was still being run when its manager was closed or the process "
                "exited",
                stage="warm-up",
            ) from None
        except Exception as error:
            on = "" if rows.sizes.elements else f" (it was run {_on(rows.sizes)}; {_REMEDY})"
            raise CaptureError(
                f"{entry.bucket} was compiled, but does not run: {error_text(error)}{on}",
                stage="warm-up",
            ) from error
        entry.journal.add_idle_run(seconds)


def _timed(program: Program, route: Route, rows: Call) -> float:
    """Runs `route` on `rows`; how many seconds that takes until its outputs are there."""
    # What comes out of padding alone may be NaN, and nobody gets it.
    with (
        program.settings.applied(),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.transfer_guard("allow"),
        jax.disable_jit(False),  # with the switch on, JAX would refuse what is compiled
    ):
        own = unshared(program, rows)
        start = perf_counter()
        _wait_for(route.call_padded(own.args, own.kwargs))
        seconds = perf_counter() - start
        jax.effects_barrier()  # the callbacks that it has called, too
        return seconds


def _wait_for(outputs: PyTree) -> None:
    """Waits as `jax.block_until_ready` does, in a thread that may be there when Python finalizes.

    JAX asks for the GIL every 200 ms. In a daemon thread and at that time this is what ends a
    process with "FATAL: exception not rethrown" and an abort, with bare JAX as well: Python unwinds
    the thread, through C++ that lets nothing pass. Out of Python's own sleep a thread just ends.
    """
    start = perf_counter()
    for leaf in jax.tree.leaves(outputs):
        # Random keys cannot be asked; they come with the others, or are waited for below.
        while hasattr(leaf, "is_ready") and not leaf.is_ready():
            time.sleep(min((perf_counter() - start) / 50, 0.05))  # 2 % more than the run takes
    jax.block_until_ready(outputs)


def runs(entry: CUDAGraphEntry) -> bool:
    """Whether a run of `entry` on padding alone succeeds; False where none can be made."""
    try:
        run_idle(entry, 1)
    except (CaptureError, InputShapeError):
        return False
    return True


_REMEDY = "a warm-up with arrays in the place of shapes runs on their rows"


class _Watch:
    """Says of a run that it takes long."""

    def __init__(
        self,
        entry: CUDAGraphEntry,
        sizes: Bucket,
        tell: Told,
        looks_on: Callable[[float], None],
    ) -> None:
        self._entry = entry
        self._sizes = sizes
        self._tell = tell
        self._looks_on = looks_on
        self._next_s = LONG_S

    def __call__(self, seconds: float) -> None:
        self._looks_on(seconds)
        if seconds < self._next_s:
            return
        self._next_s = 2 * seconds
        logger.warning(
            "%s at %s has been running for %.0f s without a request, %s: if its loop does not end "
            "on such rows, let it stop where the mask is False, or choose pad_values that end it",
            self._entry.program.target.name,
            self._entry.bucket,
            seconds,
            _on(self._sizes),
        )
        self._tell(self._entry, seconds)


def _on(sizes: Bucket) -> str:
    if not sizes.elements:
        return "on padding alone, under a mask that is False everywhere"
    return f"on {sizes} real elements of its example"


def idle_call(program: Program, call: Call, bucket: Bucket) -> Call:
    """`call` cut to `bucket`, on the host; of no rows at all where its arrays are shapes.

    So they are where they lie on several processes, none of which can read them.

    Args:
        program: The call's program.
        call: Its arrays may be `jax.ShapeDtypeStruct`.
        bucket: The most that it may have.

    Raises:
        InputShapeError: A PRNG key is a shape.
    """
    known = {**dict(enumerate(program.known_leaves())), **program.keys}
    own = [
        leaf if axes.passes_through else _readable(leaf)
        for leaf, axes in zip(call.leaves, program.axes, strict=True)
    ]
    given = [known[index] if _is_gone(leaf) else leaf for index, leaf in enumerate(own)]
    is_real = not any(
        _is_gone(leaf) and not axes.passes_through
        for leaf, axes in zip(given, program.axes, strict=True)
    )
    cut = call.sizes.map(min, bucket)
    rows = cut if is_real else cut.map(lambda size: 0)
    sizes = rows.only(program.carried, others=bucket)
    leaves = [
        _cut(leaf, abstract, axes, (call.sizes, cut), sizes)
        for leaf, abstract, axes in zip(given, program.variant.leaves, program.axes, strict=True)
    ]
    args, kwargs = jax.tree.unflatten(call.variant.structure, leaves)
    return dataclasses.replace(call, args=args, kwargs=kwargs, leaves=tuple(leaves), sizes=sizes)


def _cut(
    leaf: PyTree,
    abstract: AbstractLeaf,
    axes: LeafAxes,
    cut: tuple[Bucket, Bucket],
    sizes: Bucket,
) -> PyTree:
    """The part of `leaf` that a call of `sizes` has, if its example is cut from one to another."""
    if _is_gone(leaf):
        if jnp.issubdtype(abstract.dtype, jax.dtypes.extended):
            raise InputShapeError(
                f"{abstract} is a PRNG key: give the key itself to warm-up, not its shape"
            )
        return np.zeros(
            axes.resize(tuple(size or 0 for size in abstract.shape), sizes), abstract.dtype
        )
    value = leaf
    if not axes.passes_through:
        value = np.array(leaf, abstract.dtype)
        value = value[real_index(axes, value.ndim, sizes)]
    elif np.ndim(leaf):
        return leaf
    # Where it carries a size itself it has been cut along that, and what it holds is the user's.
    before, after = cut
    return behind_no_cut(
        value,
        after.only(axes.names, others=before),
        after,
    )


def _readable(leaf: PyTree) -> PyTree:
    """An argument that carries sizes; its shape where no process has it as a whole."""
    array = leaf.array if isinstance(leaf, Padded) else leaf
    if not isinstance(array, jax.Array) or is_readable(array):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _is_gone(leaf: PyTree) -> bool:
    """Whether nothing but the shape of an array is known."""
    if isinstance(leaf, jax.Array | Padded):
        return leaf.is_deleted()
    return isinstance(leaf, jax.ShapeDtypeStruct)
