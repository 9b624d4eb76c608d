"""One process of a job: what the programs that `jobs.ran` starts have in common."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import cudagraph_jax as cg

PORT, COUNT, INDEX = map(int, sys.argv[1:4])
# JAX, which read its own variables before, is imported already.
jax.config.update("jax_num_cpu_devices", int(os.environ["DEVICES"]))
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{PORT}", num_processes=COUNT, process_id=INDEX)
MESH = Mesh(np.array(jax.devices()), ("x",))
SPREAD, WHOLE = (NamedSharding(MESH, PartitionSpec(*axes)) for axes in (("x",), ()))
TABLE = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
WEIGHTS = jax.make_array_from_callback(TABLE.shape, SPREAD, lambda index: TABLE[index])


def mean(weights, ids, *, mask):
    """The mean of each row's vectors, which lie on the devices of all processes."""
    vectors = jnp.sum(weights[ids] * mask[..., None], axis=1)
    return jax.lax.with_sharding_constraint(vectors / jnp.sum(mask, axis=1, keepdims=True), WHOLE)


def made(function: Callable[..., Any] = mean, *, name: str = "embed", **options: Any) -> Any:
    """A bucketed function of several processes."""
    given = {"capture_sizes": (1, 4), "capture_seq_lens": (4, 8), "warmup_iterations": 1}
    names = ("unpad", "store", "fingerprint", "pad_values", "pad_side", "in_shardings")
    in_axes = options.pop("in_axes", (None, "batch seq"))
    others = {key: options.pop(key) for key in names if key in options}
    config = cg.CUDAGraphConfig(**{**given, "process_timeout_s": 20, **options})
    return cg.bucket_jit(
        function,
        in_axes=in_axes,
        mask_argname="mask",
        config=config,
        name=name,
        **others,
    )


def ids(batch: int, seq: int, seed: int = 0) -> np.ndarray:
    """Rows of so many ids, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 16, (batch, seq)).astype(np.int32)


def is_right(answer: np.ndarray, rows: np.ndarray) -> bool:
    """Whether it is the plain function's answer."""
    return bool(np.allclose(answer, TABLE[rows].mean(axis=1), atol=1e-5))


def say(name: str, value: Any) -> None:
    """Tells the test."""
    print("\n" + json.dumps([name, value]), flush=True)


def leave() -> NoReturn:
    """Ends without JAX's farewell, which waits for others; process 0 when nobody else is left."""
    if INDEX == 0:
        sys.stdin.read()
    os._exit(0)


def say_error(name: str, act: Callable[[], Any]) -> None:
    """Tells the test what is raised."""
    try:
        act()
    except Exception as error:
        say(name, [type(error).__name__, str(error)])
    else:
        say(name, ["nothing", ""])
