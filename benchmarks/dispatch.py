"""What a bucketed call costs on the host, as ratios within one run.

    python benchmarks/dispatch.py [--rounds 60] [--calls 300]

Prints the numbers that DESIGN.md promises. Contenders take turns in every round; the ratio is
taken round by round, and its median and quartiles are shown.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Mapping
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
from timing import Timing, interleaved

import cudagraph_jax as cg
from cudagraph_jax.demo.decoder.transformer import KVCache

CONFIG = cg.CUDAGraphConfig(capture_sizes=(1, 2, 4, 8, 16), capture_seq_lens=(16, 32, 64, 128))


def tiny(x, y):
    """A function whose run time is next to nothing: XLA runs it in the calling thread."""
    return x * 2.0 + y


def with_parameters(parameters, x):
    """A function that is passed 98 parameter arrays."""
    return x + sum(leaf[0] for leaf in parameters.values())


def with_cache(cache, x):
    """A function whose sizes a pytree of 48 arrays carries: the KV cache of 24 layers."""
    return x + sum(leaf[:, 0] for leaf in jax.tree.leaves(cache))


def exact_hits(rounds: int, calls: int) -> list[tuple[str, Timing, Timing, str]]:
    """Exact hits against the raw compiled call."""
    times = interleaved({**_hits(), **_hits_of_many_arrays()}, rounds=rounds, calls=calls)
    return [
        (f"exact hit, {what}", times[hit], times[raw], promise)
        for what, hit, raw, promise in (
            ("tiny function / raw call", "hit", "raw", "<= 1.15"),
            ("NumPy arrays / raw call with them", "hit, numpy", "raw, numpy", "<= 1.20"),
            ("98-leaf parameters / raw call", "hit 98", "raw 98", "<= 1.03"),
            ("sizes in a pytree of 48 arrays / raw call", "hit cache", "raw cache", ""),
            ('unpad="host" / raw call + numpy.asarray', "hit, fetched", "raw, fetched", ""),
        )
    ]


def _hits() -> dict[str, Callable[[], object]]:
    """A tiny function's calls, left on the device and fetched."""
    x, host = jnp.ones((4, 16)), np.ones((4, 16), np.float32)
    raw = jax.jit(tiny).lower(x, x).compile()
    axes = ("batch seq", "batch seq")
    on_device = cg.bucket_jit(tiny, in_axes=axes, config=CONFIG, unpad="none")
    on_host = cg.bucket_jit(tiny, in_axes=axes, config=CONFIG)
    return {
        "raw": lambda: raw(x, x),
        "hit": lambda: on_device(x, x),
        "raw, numpy": lambda: raw(host, host),
        "hit, numpy": lambda: on_device(host, host),
        "raw, fetched": lambda: np.asarray(raw(x, x)),
        "hit, fetched": lambda: on_host(x, x),
    }


def _hits_of_many_arrays() -> dict[str, Callable[[], object]]:
    """Calls with 98 parameters, and with sizes in the arrays of a cache."""
    x = jnp.ones((4, 16))
    parameters = {f"p{i:02}": jnp.ones((4,)) for i in range(98)}
    raw_98 = jax.jit(with_parameters).lower(parameters, x).compile()
    hit_98 = cg.bucket_jit(
        with_parameters, in_axes=(None, "batch seq"), config=CONFIG, unpad="none"
    )
    keys, values = (tuple(jnp.ones((4, 16)) for _ in range(24)) for _ in range(2))
    cache, row = KVCache(keys, values), jnp.ones(4)
    raw_cache = jax.jit(with_cache).lower(cache, row).compile()
    hit_cache = cg.bucket_jit(
        with_cache, in_axes=("batch seq", "batch"), config=CONFIG, unpad="none"
    )
    return {
        "raw 98": lambda: raw_98(parameters, x),
        "hit 98": lambda: hit_98(parameters, x),
        "raw cache": lambda: raw_cache(cache, row),
        "hit cache": lambda: hit_cache(cache, row),
    }


def read_histogram(rounds: int) -> list[tuple[str, Timing, Timing, str]]:
    """Exact hits while another thread reads the histogram of sizes, against the same hits.

    A hit does nothing for the histogram: its sizes are counted when somebody reads them. So it is
    the reading that is measured, ten times a second, in turns of about a fifth of a second.
    """
    x = jnp.ones((4, 16))
    hit = cg.bucket_jit(tiny, in_axes=("batch seq", "batch seq"), config=CONFIG, unpad="none")
    reading, over = threading.Event(), threading.Event()

    def read() -> None:
        while not over.wait(0.1):
            if reading.is_set():
                hit.manager.sizes()

    def hits(switch: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            switch()
            for _ in range(1000):
                hit(x, x)

        return run

    reader = threading.Thread(target=read)
    reader.start()
    try:
        times = interleaved(
            {"read": hits(reading.set), "left alone": hits(reading.clear)}, rounds=rounds, calls=30
        )
    finally:
        over.set()
        reader.join()
    each = {name: Timing(tuple(us / 1000 for us in t.rounds_us)) for name, t in times.items()}
    what = "exact hit, sizes() 10 times a second / without"
    return [(what, each["read"], each["left alone"], "<= 1.03")]


def padded_call(rounds: int, calls: int) -> list[tuple[str, Timing, Timing, str]]:
    """A padded NumPy call against `jnp.pad` + `jit` + slice, and against padding by hand."""
    x = np.ones((3, 13), np.float32)
    bucketed = cg.bucket_jit(tiny, in_axes=("batch seq", "batch seq"), config=CONFIG)
    jitted = jax.jit(tiny)
    whole = jnp.ones((4, 16))
    raw = jax.jit(tiny).lower(whole, whole).compile()

    def in_jax() -> jax.Array:
        padded = [jnp.pad(array, ((0, 1), (0, 3))) for array in (x, x)]
        return jitted(*padded)[:3, :13]

    def by_hand() -> np.ndarray:
        padded = np.zeros((4, 16), np.float32), np.zeros((4, 16), np.float32)
        for whole, array in zip(padded, (x, x), strict=True):
            whole[:3, :13] = array
        return np.asarray(raw(*padded))[:3, :13]

    contenders = {"bucketed": lambda: bucketed(x, x), "jax": in_jax, "numpy": by_hand}
    times = interleaved(contenders, rounds=rounds, calls=calls)
    del contenders["jax"]
    apart = with_pauses(contenders, rounds=rounds, calls=calls)
    return [
        ("jnp.pad + jit + x[:n] / padded NumPy call", times["jax"], times["bucketed"], ">= 8"),
        ("padded NumPy call / by hand in NumPy", times["bucketed"], times["numpy"], "<= 1.25"),
        ("the same, 100 us between calls", apart["bucketed"], apart["numpy"], "<= 1.10"),
    ]


def named_axes(rounds: int, calls: int) -> list[tuple[str, Timing, Timing, str]]:
    """A padded NumPy call of four named axes, in one array or in two, against padding by hand."""
    config = cg.CUDAGraphConfig(
        capture_sizes=(1, 2, 4), capture_axes=dict.fromkeys(("a", "b", "c", "d"), (4, 8))
    )
    x, pair = np.ones((4, 4, 3, 3), np.float32), np.ones((3, 3), np.float32)
    one = cg.bucket_jit(tiny, in_axes=("a b c d", "a b c d"), config=config)
    two = cg.bucket_jit(lambda x, y: (x * 2.0, y + 1.0), in_axes=("a b", "c d"), config=config)
    whole, half = jnp.ones((4, 4, 4, 4)), jnp.ones((4, 4))
    raw = jax.jit(tiny).lower(whole, whole).compile()
    raw_two = jax.jit(lambda x, y: (x * 2.0, y + 1.0)).lower(half, half).compile()

    def by_hand() -> np.ndarray:
        padded = np.zeros(whole.shape, np.float32), np.zeros(whole.shape, np.float32)
        for buffer in padded:
            buffer[:4, :4, :3, :3] = x
        return np.asarray(raw(*padded))[:4, :4, :3, :3]

    def two_by_hand() -> list[np.ndarray]:
        padded = np.zeros(half.shape, np.float32), np.zeros(half.shape, np.float32)
        for buffer in padded:
            buffer[:3, :3] = pair
        return [np.asarray(output)[:3, :3] for output in raw_two(*padded)]

    contenders = {
        "one": lambda: one(x, x),
        "by hand": by_hand,
        "two": lambda: two(pair, pair),
        "two by hand": two_by_hand,
    }
    times = interleaved(contenders, rounds=rounds, calls=calls)
    what = "four named axes, padded NumPy call / by hand"
    return [
        (what, times["one"], times["by hand"], ""),
        ("the same, two axes in each of two arrays", times["two"], times["two by hand"], ""),
    ]


def chain(rounds: int, calls: int) -> list[tuple[str, Timing, Timing, str]]:
    """Three functions, each of which takes what the one before gives: on the device, and by host.

    The padding is filled anew between two of them, unless they say that they ignore it.
    """
    x = np.ones((3, 57), np.float32)
    contenders = {
        "host": _chain("host"),
        "padded": _chain("padded"),
        "any": _chain("padded", pad_values="any"),
    }
    times = interleaved(
        {name: lambda call=call: call(x) for name, call in contenders.items()},
        rounds=rounds,
        calls=calls,
    )
    what = 'chain of three, 3x57x384, unpad="padded" / "host"'
    return [
        (what, times["padded"], times["host"], ""),
        ('the same, pad_values="any"', times["any"], times["host"], "<= 1"),
    ]


def _chain(unpad: str, pad_values: int | str = 0) -> Callable[[np.ndarray], np.ndarray]:
    options = {"pad_values": pad_values, "config": CONFIG}
    spread = cg.bucket_jit(
        lambda x: jnp.repeat(x[..., None], 384, -1), in_axes="batch seq", unpad=unpad, config=CONFIG
    )
    scaled = cg.bucket_jit(lambda x: x * 2.0 + 1.0, in_axes="batch seq _", unpad=unpad, **options)
    first = cg.bucket_jit(lambda x: x[:, 0].sum(-1), in_axes="batch seq _", **options)
    return lambda x: first(scaled(spread(x)))


def larger_program(rounds: int, calls: int) -> list[tuple[str, Timing, Timing, str]]:
    """A program that XLA hands to its threads, which spin for a while after a call: with pauses."""
    x = jnp.ones((16, 128))
    raw = jax.jit(tiny).lower(x, x).compile()
    hit = cg.bucket_jit(tiny, in_axes=("batch seq", "batch seq"), config=CONFIG, unpad="none")
    times = with_pauses(
        {"hit": lambda: hit(x, x), "raw": lambda: raw(x, x)}, rounds=rounds, calls=calls
    )
    return [("exact hit of 16x128, 100 us between calls", times["hit"], times["raw"], "")]


def with_pauses(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int,
    pause_us: float = 100,
) -> dict[str, Timing]:
    """Times of calls that are as far apart as those of a server, in turns; pauses not counted."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            spent = 0.0
            for _ in range(calls):
                start = perf_counter() + pause_us * 1e-6
                while perf_counter() < start:
                    pass
                call()
                spent += perf_counter() - start
            found[name].append(spent / calls * 1e6)
    return {name: Timing(tuple(each)) for name, each in found.items()}


def compiles_in_traffic(calls: int = 10_000) -> int:
    """Compiles in random calls after warm-up, counted by `jax.monitoring`."""
    bucketed = cg.bucket_jit(tiny, in_axes=("batch seq", "batch seq"), config=CONFIG)
    bucketed.warmup(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), progress=False)
    events: list[str] = []

    def count(event: str, duration_secs: float, **kwargs: object) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    draw = np.random.default_rng(0)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for batch, seq in draw.integers((1, 1), (17, 129), (calls, 2)):
            x = np.ones((batch, seq), np.float32)
            bucketed(x, x)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    return len(events)


def worst_difference() -> float:
    """Largest difference from eager over every size of a small encoder block, float32."""
    draw = np.random.default_rng(0)
    weights = jnp.asarray(draw.standard_normal((32, 32)) / 6, jnp.float32)

    def block(weights, x, mask):
        scores = jnp.einsum("bqd,bkd->bqk", x @ weights, x) / 32**0.5
        scores = jnp.where(mask[:, None, :], scores, -1e9)
        return jax.nn.softmax(scores) @ x

    config = cg.CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(8, 16))
    bucketed = cg.bucket_jit(block, in_axes=(None, "batch seq _", "batch seq"), config=config)
    differences = []
    for batch in range(1, 5):
        for seq in range(1, 17, 3):
            x = draw.standard_normal((batch, seq, 32)).astype(np.float32)
            mask = np.ones((batch, seq), np.bool_)
            eager = np.asarray(block(weights, jnp.asarray(x), jnp.asarray(mask)))
            differences.append(np.abs(bucketed(weights, x, mask) - eager).max())
    return float(np.max(differences))


def main() -> int:
    """Prints the table; the exit status says whether every promise held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=300)
    options = parser.parse_args()
    rows = [
        *exact_hits(options.rounds, options.calls),
        *read_histogram(max(options.rounds // 4, 2)),
        *padded_call(options.rounds, options.calls),
        *named_axes(options.rounds, options.calls),
        *chain(options.rounds, max(options.calls // 5, 1)),
        *larger_program(options.rounds, options.calls),
    ]
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} ({device.device_kind}), medians")
    print(f"{'what':52} {'us':>8} {'peer us':>8} {'ratio':>6} {'quartiles':>13}  promised")
    held = True
    for what, timing, peer, promise in rows:
        low, ratio, high = timing.ratio_to(peer)
        print(
            f"{what:52} {timing.median_us:8.2f} {peer.median_us:8.2f} {ratio:6.2f} "
            f"{low:6.2f}-{high:<6.2f}  {promise}"
        )
        if promise:
            sign, limit = promise.split()
            held &= ratio <= float(limit) if sign == "<=" else ratio >= float(limit)
    compiles, difference = compiles_in_traffic(), worst_difference()
    print(f"{'compiles in 10,000 random calls after warm-up':52} {compiles:8}  0")
    print(f"{'largest difference from eager, real rows, float32':52} {difference:8.1e}  < 1e-5")
    held &= compiles == 0 and difference < 1e-5
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
