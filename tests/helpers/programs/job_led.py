"""Calls that process 0 leads, from four threads; run by test_leading.py."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from functools import partial

import jax
import numpy as np

import cudagraph_jax as cg
from cudagraph_jax import distributed
from tests.helpers.member import (
    COUNT,
    INDEX,
    SPREAD,
    WEIGHTS,
    WHOLE,
    ids,
    is_right,
    leave,
    made,
    say,
    say_error,
)

CALLS, ENDING = int(sys.argv[4]), sys.argv[5]
# Long where nothing falls silent, so that a slow machine is not taken for a process that hangs.
TIMEOUT_S = 2.5 if "stopped" in ENDING else 20.0


def crowd(led):
    """Random calls from four threads; how many were wrong."""
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(CALLS // 4):
            rows = rng.integers(0, 16, rng.integers(1, (5, 9))).astype(np.int32)
            if not is_right(led(rows), rows):
                wrong.append(rows.shape)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(wrong)


def leading(embed):
    with distributed.lead(embed, WEIGHTS, timeout_s=TIMEOUT_S) as led:
        LED.append(led)
        say("repr", repr(led))
        start = time.monotonic()
        say("wrong", crowd(led))
        say("seconds", time.monotonic() - start)
        say_error("bad input", lambda: led(np.ones((2, 3, 4), np.int32)))
        say_error("bad dtype", lambda: led(np.ones((2, 3))))
        say_error("too large", lambda: led(ids(9, 9)))
        say_error("reset", embed.manager.reset)
        say_error("cleared", embed.registry.clear)
        say_error("removed", lambda: embed.registry.remove(4, 8))
        say_error("padded by itself", lambda: embed.pad(WEIGHTS, ids(1, 1)))
        say_error("spread by itself", lambda: spread(np.ones((2, 5), np.float32)))
        say_error("itself", lambda: embed(WEIGHTS, ids(1, 1)))
        with cg.Batcher(led) as batcher:
            items = [ids(1, 1 + seed % 8, seed)[0] for seed in range(30)]
            answers = batcher.map(items)
            say(
                "batched", [is_right(a[None], i[None]) for a, i in zip(answers, items, strict=True)]
            )
            say_error("update", lambda: batcher.update(WEIGHTS))
        say("compiled", embed.registry.capture_count)
        ending(led)


def ending(led):
    """Something happens to another process, and calls fail in a stated time."""
    if ENDING == "closed":
        return
    if ENDING.startswith("leader"):
        doom()
    start = time.monotonic()
    say_error("failed", lambda: [led(ids(3, 5)) for _ in range(100_000)])
    say("failed after", time.monotonic() - start)
    start = time.monotonic()
    say_error("again", lambda: led(ids(3, 5)))
    say("again after", time.monotonic() - start)


def doom(after=100):
    """Has something happen to this process so many calls from now."""
    before = embed.registry.totals.replays

    def act():
        while embed.registry.totals.replays < before + after:
            time.sleep(0.01)
        if ENDING.endswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if ENDING.endswith("stopped"):
            os.kill(os.getpid(), signal.SIGSTOP)
        WEIGHTS.delete()  # so that the next call raises

    threading.Thread(target=act, daemon=True).start()


@cg.bucket_jit(
    in_axes="batch seq", config=cg.CUDAGraphConfig(capture_sizes=(COUNT,), process_timeout_s=0.5)
)
def spread(x):
    """Rows that the function itself spreads over the processes, as no argument shows."""
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, SPREAD), WHOLE)


def capturing():
    """Buckets that nobody has captured before process 0 is asked for them."""
    late, rows = made(name="late", max_graphs=1), ids(3, 5)
    if INDEX:
        distributed.follow(late, WEIGHTS, timeout_s=TIMEOUT_S)
    else:
        with distributed.lead(late, WEIGHTS, timeout_s=TIMEOUT_S) as led:
            said = [is_right(led(rows), rows)]
            say_error("no room", lambda: led(ids(1, 5)))
            say("asked for", [*said, is_right(led(rows), rows)])
    say("captured", [late.registry.num_graphs, late.stats()["registry"]["total_replays"]])


def halved(weights, ids, *, mask):
    """Every second vector of each row, of rows that are not of three."""
    if ids.shape[1] == 3:
        raise ValueError("not three")
    return jax.lax.with_sharding_constraint(weights[ids][:, ::2], WHOLE)


def refusing():
    """Buckets that are not captured, for calls that are refused before anybody is told."""
    halves = made(halved, name="halved")
    away = made(name="away", in_shardings=(WHOLE, None))
    for name, function, rows in (("own size", halves, ids(3, 3)), ("away", away, ids(3, 5))):
        if INDEX:
            say_error(name, partial(distributed.follow, function, WEIGHTS, timeout_s=TIMEOUT_S))
        else:
            with distributed.lead(function, WEIGHTS, timeout_s=TIMEOUT_S) as led:
                say_error(name, partial(led, rows))
                if function is halves:
                    say("another size", led(ids(3, 4)).shape)


if ENDING == "closed":
    capturing()
    refusing()
embed = made(warmup_iterations=1)
embed.warmup(WEIGHTS, ids(1, 3), progress=False)
LED: list[distributed.Led] = []
if INDEX == 0:
    say_error("left", lambda: leading(embed))
    say_error("after", lambda: LED[0](ids(1, 1)))
else:
    if INDEX == COUNT - 1 and ENDING in ("killed", "stopped", "raised"):
        doom(after=CALLS + 60)
    say_error("followed", lambda: distributed.follow(embed, WEIGHTS, timeout_s=TIMEOUT_S))
    say("replays", embed.stats()["registry"]["total_replays"])
start = time.monotonic()
say_error("unled", lambda: say("unled is right", is_right(embed(WEIGHTS, ids(1, 2)), ids(1, 2))))
say("unled after", time.monotonic() - start)
say("end", True)
leave()
