"""A run of several processes that fails on one of them, or on all; run by test_guard.py."""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

import cudagraph_jax as cg
from tests.helpers.faults import NO_MEMORY
from tests.helpers.member import INDEX, SPREAD, WHOLE, leave, say, say_error

FAILS = sys.argv[4]
TROUBLE: list[str] = []


class Starved(Compiled):
    """A compiled function for which there is no memory while there is trouble."""

    __slots__ = ()

    def __call__(self, *args, **kwargs):
        if TROUBLE:
            raise RuntimeError(TROUBLE[0])
        return super().__call__(*args, **kwargs)


def starving(request, lowering, *, clock):
    """Compiles as XLA does."""
    executable = lowering.compile(compiler_options=request.options, clock=clock)
    starved = copy.copy(executable.call)
    starved.__class__ = Starved
    return replace(executable, call=starved)


def squares(scale, x):
    """It spreads its rows over the processes itself, unless its argument does."""
    rows = jax.lax.with_sharding_constraint(x * jnp.sum(scale), SPREAD)
    return jax.lax.with_sharding_constraint((rows - rows.sum()) ** 2, WHOLE)


config = cg.CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(4,), process_timeout_s=20)
manager = cg.CUDAGraphManager(config, compiler=starving)
function = cg.bucket_jit(squares, in_axes=(None, "batch seq"), manager=manager)
rows = np.ones((2, 3), np.float32)
scale = jax.make_array_from_callback((2,), SPREAD, lambda index: np.ones(2, np.float32)[index])
if FAILS == "warm-up":
    TROUBLE += [NO_MEMORY] * INDEX
    act = lambda: function.warmup(scale, rows, progress=False)  # noqa: E731
else:
    function(1.0, rows)
    TROUBLE.append(NO_MEMORY)
    act = lambda: function(1.0, rows)  # noqa: E731
for name in ("fails", "then"):
    start = time.monotonic()
    say_error(name, act)
    TROUBLE.clear()
    say(f"{name} after", time.monotonic() - start)
leave()
