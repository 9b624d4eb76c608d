"""What leading costs a call over two processes on this machine, beside what others broadcast with.

    python benchmarks/lead.py [--calls 1000]

A tiny function with one collective (gloo) is called on both processes:

- `raw`: the compiled call by itself, each process with the same data of its own;
- `led`: `cudagraph_jax.distributed.lead`, which tells bucket and data, and pads and trims;
- `broadcast + raw`: `multihost_utils.broadcast_one_to_all` of the same data, then the same call, as
  a leader of one's own is mostly written;
- `broadcast`: that alone;
- `compared`: the bucketed function itself, whose data the processes compare before each call;
- `compared, 64 MB`: the same beside 64 MB of parameters that each process has for itself;
- `key-value store`: one exchange of the data by the coordinator, which is most of `compared`.

Medians and 99th percentiles of process 0, in microseconds; both share the cores.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

SHAPES = ((8, 128), (64, 512))
WARM_UP = 20


def main() -> int:
    """Starts the two processes, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--process", nargs=2, metavar=("PORT", "INDEX"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is not None:
        measure(*map(int, options.process), calls=options.calls)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    print("us a call (median, p99)", *(f"{rows}x{length}" for rows, length in SHAPES), sep="\t")
    sys.stdout.flush()
    command = [sys.executable, __file__, "--calls", str(options.calls), "--process", str(port)]
    processes = [
        subprocess.Popen([*command, str(index)], env={**os.environ, "JAX_PLATFORMS": "cpu"})
        for index in range(2)
    ]
    ended = [process.wait() for process in processes]
    for index, status in enumerate(ended):
        if status:  # negative: the signal that ended it
            print(f"process {index} ended with {status}", file=sys.stderr)
    return int(any(ended))


def timed(call: Callable[[], object], calls: int) -> str:
    """Median and 99th percentile of a call, in microseconds."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return " ".join(f"{value * 1e6:,.0f}" for value in np.percentile(times, (50, 99)))


def measure(port: int, index: int, *, calls: int) -> None:
    """One of the processes; the first prints."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.multihost_utils import broadcast_one_to_all
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import cudagraph_jax as cg
    from cudagraph_jax import distributed
    from cudagraph_jax.capture.peers import PEERS

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    spread, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
    table = np.ones((64, 8), np.float32)
    weights = jax.make_array_from_callback(table.shape, spread, lambda part: table[part])

    def embed(weights, ids):
        return jax.lax.with_sharding_constraint(jnp.sum(weights[ids], axis=1), whole)

    batches, lengths = zip(*SHAPES, strict=True)
    config = cg.CUDAGraphConfig(capture_sizes=batches, capture_seq_lens=lengths)
    bucketed = cg.bucket_jit(embed, in_axes=(None, "batch seq"), config=config)
    data = [np.ones(shape, np.int32) for shape in SHAPES]
    bucketed.warmup(weights, data[0], progress=False)
    raw = [jax.jit(embed).lower(weights, ids).compile() for ids in data]

    def told(ids: np.ndarray) -> list[str]:
        return PEERS.coordinator.compare(
            "a row of this table", {}, timeout_s=60, said=ids.tobytes().hex()
        )

    def everywhere(name: str, call: Callable[[int], object]) -> None:
        row = [timed(lambda place=place: call(place), calls) for place in range(len(data))]
        if index == 0:
            print(name, *row, sep="\t", flush=True)

    everywhere("raw", lambda place: np.asarray(raw[place](weights, data[place])))
    everywhere("broadcast", lambda place: broadcast_one_to_all(data[place]))
    everywhere(
        "broadcast + raw",
        lambda place: np.asarray(raw[place](weights, broadcast_one_to_all(data[place]))),
    )
    everywhere("compared", lambda place: bucketed(weights, data[place]))
    large = jnp.ones(16 << 20)
    beside = cg.bucket_jit(
        lambda parameters, ids: embed(parameters[0], ids),
        in_axes=(None, "batch seq"),
        config=config,
    )
    everywhere("compared, 64 MB", lambda place: beside((weights, large), data[place]))
    everywhere("key-value store", lambda place: told(data[place]))
    if index == 0:
        with distributed.lead(bucketed, weights) as led:
            everywhere("led", lambda place: led(data[place]))
    else:
        distributed.follow(bucketed, weights)
    os._exit(0)  # without JAX's own farewell, which waits for the other


if __name__ == "__main__":
    sys.exit(main())
