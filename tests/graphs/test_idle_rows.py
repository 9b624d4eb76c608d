"""Runs without a request: on which rows, and what is said of one that does not end."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import Bucket, CUDAGraphConfig, CUDAGraphWarning, bucket_jit
from cudagraph_jax._base.lru import CacheItem
from cudagraph_jax.capture.warmup import warm_up
from cudagraph_jax.graphs.warm_runs import LONG_S, run_idle
from cudagraph_jax.report.progress import Progress
from tests.helpers.faults import managed
from tests.helpers.functions import assert_close, double, floats
from tests.helpers.processes import run_script

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60
CONFIG = CUDAGraphConfig(
    capture_sizes=(2, 4), capture_seq_lens=(2, 6), warmup_iterations=1, on_miss="background"
)
IDS = np.arange(1, 13, dtype=np.int32).reshape(3, 4)


class Seen:
    """A function that notes what it runs on, by its size."""

    def __init__(self) -> None:
        self.runs: dict[tuple[int, ...], list[tuple[np.ndarray, ...]]] = {}

    def __call__(self, ids, *others, mask):
        jax.debug.callback(self._note, ids, mask, *others)
        return jnp.where(mask, ids, 0)

    def _note(self, ids, *others):
        arrays = tuple(map(np.array, (ids, *others)))
        self.runs.setdefault(arrays[0].shape, []).append(arrays)

    def clear(self) -> None:
        """Forgets all runs until now."""
        jax.effects_barrier()
        self.runs = {}

    def only(self) -> dict[tuple[int, ...], tuple[np.ndarray, ...]]:
        """What the one run of each bucket was on."""
        jax.effects_barrier()
        assert all(len(found) == 1 for found in self.runs.values())
        return {bucket: found[0] for bucket, found in self.runs.items()}


def masked(seen, *, manager=None, in_axes="batch seq", **options: Any) -> Any:
    manager = managed(CONFIG) if manager is None else manager
    return bucket_jit(seen, in_axes=in_axes, mask_argname="mask", manager=manager, **options)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_a_warm_up_runs_on_the_rows_of_its_example(make):
    """Each bucket gets the example's own rows, cut or padded to it, and the mask says which."""
    seen = Seen()
    masked(seen, pad_values=-1).warmup(make(IDS), progress=False)
    runs = seen.only()
    assert set(runs) == {(2, 2), (2, 6), (4, 2), (4, 6)}
    for (batch, seq), (ids, mask) in runs.items():
        rows, length = min(batch, 3), min(seq, 4)
        expected = np.full((batch, seq), -1)
        expected[:rows, :length] = IDS[:rows, :length]
        real = np.zeros((batch, seq), bool)
        real[:rows, :length] = True
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(mask, real)


@pytest.mark.parametrize("pad", [0, 7, "edge"])
@pytest.mark.parametrize("how", ["shapes", "background", "seal", "replan"])
def test_without_rows_everything_is_padding(how, pad):
    """Where only shapes are known, arrays hold their pad value and the mask is False throughout."""
    seen = Seen()
    with managed(CONFIG, evicts=True) as manager:
        function = masked(seen, manager=manager, pad_values=pad)
        if how == "shapes":
            function.warmup(jax.ShapeDtypeStruct(IDS.shape, IDS.dtype), progress=False)
        elif how == "background":
            function(IDS)  # eagerly
            manager.wait()
        else:
            function.warmup(IDS, progress=False)
            function(IDS)
            seen.clear()
            function.seal() if how == "seal" else function.replan(max_graphs=4)
            manager.wait()
        runs = seen.only()
    runs.pop(IDS.shape, None)
    assert runs
    for ids, mask in runs.values():
        assert not mask.any()
        np.testing.assert_array_equal(ids, 0 if pad == "edge" else pad)


def test_half_an_example_is_none():
    """Rows of one array without those of another are no rows that a request could have."""
    seen = Seen()
    other = jax.ShapeDtypeStruct((3,), np.float32)
    masked(seen, in_axes=("batch seq", "batch")).warmup(IDS, other, progress=False)
    for ids, mask, floating in seen.only().values():
        assert not any(array.any() for array in (ids, mask, floating))


def test_lengths_end_where_their_rows_are_cut():
    """A length, for each row or alone, is at most that of the bucket; the rows' ids stay."""
    seen = Seen()
    lengths = np.array([4, 1, 2], np.int32)
    masked(seen, in_axes=("batch seq", "batch", None)).warmup(IDS, lengths, 4, progress=False)
    runs = seen.only()
    ids, _, cut, alone = runs[2, 2]
    np.testing.assert_array_equal(ids, IDS[:2, :2])
    assert (cut.tolist(), int(alone)) == ([2, 1], 2)
    assert runs[4, 6][2].tolist() == [4, 1, 2, 0]
    assert int(runs[4, 6][3]) == 4


def test_donated_examples_stay():
    """The example's arrays are its caller's after a warm-up, also those that a call gives away."""
    function: Any = bucket_jit(
        lambda state, x: (state + x, x),
        in_axes="batch seq",
        donate_argnums=0,
        config=CONFIG,
        unpad="none",
    )
    state = jnp.ones((4, 6))
    assert not function.warmup(state, floats(0, 4, 6), progress=False).failed
    assert_close(state, np.ones((4, 6), np.float32))


def refusing(ids, *, mask):
    """A function that fails where the mask calls a token real that is none."""

    def check(ids, mask):
        if (np.asarray(mask) & (np.asarray(ids) == 0)).any():
            raise ValueError("token 0")
        return np.asarray(ids)

    shape = jax.ShapeDtypeStruct(ids.shape, ids.dtype)
    return jax.pure_callback(check, shape, ids, mask)


@pytest.mark.parametrize("example", [IDS, jax.ShapeDtypeStruct(IDS.shape, IDS.dtype)])
def test_only_rows_that_are_bad_fail(example):
    """A function that checks its real rows refuses no bucket, at any run without a request."""
    with managed(CONFIG, evicts=True) as manager:
        function = masked(refusing, manager=manager)
        assert not function.warmup(example, progress=False).failed
        manager.seal()
        assert manager.registry.num_graphs == 4
        with pytest.warns(CUDAGraphWarning, match="(?s)does not run.*token 0"):
            bad = masked(refusing).warmup(IDS * 0, progress=False)
        assert len(bad.failed) == 4


def test_a_function_that_refuses_padding_is_told_how_to_warm_up():
    """One that takes no batch of padding alone says that it was run on that, and helps itself."""

    def somebody(ids, *, mask):
        def check(mask):
            if not np.any(mask):
                raise ValueError("nobody there")
            return np.asarray(mask)

        found = jax.pure_callback(check, jax.ShapeDtypeStruct(mask.shape, mask.dtype), mask)
        return jnp.where(found, ids, 0)

    shapes = jax.ShapeDtypeStruct(IDS.shape, IDS.dtype)
    with pytest.warns(CUDAGraphWarning, match="(?s)padding alone.*a warm-up with arrays"):
        report = masked(somebody).warmup(shapes, progress=False)
    assert len(report.failed) == 4
    assert not masked(somebody).warmup(IDS, progress=False).failed


@pytest.mark.parametrize("of_all_threads", [False, True])
def test_padding_alone_may_be_nan(of_all_threads):
    """Under `jax.debug_nans` the mean of no rows is no reason to drop a bucket."""

    def mean(x, *, mask):
        return jnp.where(mask, x, 0).sum(1) / mask.sum(1)

    shapes = jax.ShapeDtypeStruct((3, 4), np.float32)
    with contextlib.ExitStack() as context:
        if of_all_threads:
            jax.config.update("jax_debug_nans", True)
            context.callback(jax.config.update, "jax_debug_nans", False)
        else:
            context.enter_context(jax.debug_nans(True))
        assert not masked(mean).warmup(shapes, progress=False).failed


class Slow(logging.Handler):
    """A function that does not end before it is told of; and what was told."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []
        self._end = threading.Event()

    def emit(self, record):
        self.told.append(record.getMessage())
        self._end.set()

    def __call__(self, x):
        def wait(x):
            assert self._end.wait(PATIENCE_S)
            return np.asarray(x)

        return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@pytest.fixture
def slow():
    handler = Slow()
    logging.getLogger("cudagraph_jax").addHandler(handler)
    yield handler
    logging.getLogger("cudagraph_jax").removeHandler(handler)


def captured(function, example):
    config = dataclasses.replace(CONFIG, capture_sizes=(4,), capture_seq_lens=(6,))
    config = dataclasses.replace(config, warmup_iterations=0)
    bucketed = bucket_jit(function, in_axes="batch seq", config=config, name="slow")
    bucketed.warmup(example, progress=False)
    (entry,) = bucketed.registry.entries()
    return entry, bucketed.describe(example)


def test_a_run_that_takes_long_is_told_of(slow):
    """A warning names the function, the bucket and the rows, and the progress shows it, too."""
    entry, call = captured(slow, floats(0, 3, 4))
    steps: list[tuple[int, int, str]] = []
    ticks = itertools.count(step=LONG_S)
    warm_up(
        "slow",
        [Bucket(4, 6)],
        lambda bucket: CacheItem(entry, is_new=True),
        iterations=1,
        call=call,
        failed=lambda bucket, error: pytest.fail(str(error)),
        broken=lambda entry, error: pytest.fail(str(error)),
        progress=Progress(lambda *step: steps.append((*step[:2], str(step[2])))),
        clock=lambda: float(next(ticks)),
    )
    assert slow.told[0].startswith(
        "slow at 4x6 has been running for 10 s without a request, on 3x4 real elements"
    )
    assert steps[:2] == [(1, 1, "compile 4x6"), (0, 1, "run 4x6 for 10 s so far")]
    assert steps[-1] == (1, 1, "run 4x6")


def test_padding_that_takes_long_is_told_of(slow):
    """Of a run on padding alone the warning says that it is one."""
    entry, _ = captured(slow, floats(0, 3, 4))
    ticks = itertools.count(step=LONG_S)
    run_idle(entry, 1, clock=lambda: float(next(ticks)))
    assert "on padding alone, under a mask that is False everywhere" in slow.told[0]


ENDLESS = """
import signal, sys, threading
import jax, jax.numpy as jnp, numpy as np
from cudagraph_jax import CUDAGraphConfig, bucket_jit

began = threading.Event()

def endless(x):
    if not isinstance(x, jax.core.Tracer):
        return x
    jax.debug.callback(lambda x: began.set(), x)
    go = lambda state: (state[0] * 0, state[1] + 1)
    return jax.lax.while_loop(lambda state: state[0] >= 0, go, (x[0, 0] * 0, x))[1]

config = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(6,), on_miss="background")
function = bucket_jit(endless, in_axes="batch seq", out_axes="batch seq", config=config)
x = np.ones((2, 3), np.float32)
"""


@pytest.mark.parametrize("ending", ["", "function.manager.close()"])
def test_the_process_exits_while_the_background_runs_on(ending):
    """A bucket whose run does not end keeps neither close() nor the end of the process waiting."""
    done = run_script(
        ENDLESS + f"function(x)\nassert began.wait(60)\n{ending}\nprint('the end', flush=True)"
    )
    assert (done.returncode, done.stdout) == (0, "the end\n")
    assert "endless is not captured: 4x6 was still being run when" in done.stderr


def test_an_interrupt_ends_a_warm_up_that_runs_on():
    """Ctrl-C ends a warm-up in whose run XLA loops for ever, and the process ends, too."""
    script = """
def interrupt():
    began.wait(60)
    signal.raise_signal(signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    function.warmup(x, progress=False)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    done = run_script(ENDLESS + script)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


LARGE = """
def large(x):
    if not isinstance(x, jax.core.Tracer):
        return x
    return jax.lax.while_loop(lambda x: jnp.all(x >= 0), lambda x: x + 1, x)

class Slow:
    def __del__(self, wait=threading.Event().wait):
        wait(1)  # longer than the 200 ms after which JAX asks for the GIL

slow = Slow()  # goes when Python finalizes
config = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(65536,), on_miss="background")
function = bucket_jit(large, in_axes="batch seq", out_axes="batch seq", config=config)
x = np.ones((4, 65536), np.float32)

def until_it_runs():
    while not any(thread.name == "cudagraph-jax-run" for thread in threading.enumerate()):
        threading.Event().wait(0.01)

def interrupt():
    until_it_runs()
    signal.raise_signal(signal.SIGINT)
"""
WARM_UP = """
threading.Thread(target=interrupt).start()
try:
    function.warmup(x, progress=False)
except KeyboardInterrupt:
    sys.exit(7)
"""


@pytest.mark.parametrize(
    "ending", [WARM_UP, "function(x)\nuntil_it_runs()\nsys.exit(7)"], ids=["warmup", "background"]
)
def test_a_thread_that_waits_for_xla_does_not_abort_the_process(ending):
    """The process ends as it wants to, also where XLA runs on in threads of its own."""
    done = run_script(ENDLESS + LARGE + ending)
    assert (done.returncode, done.stdout) == (7, ""), done.stderr


def test_warm_up_is_as_the_plain_function_afterwards():
    """Runs without a request change no answer."""
    function = bucket_jit(double, in_axes="batch seq", config=CONFIG)
    function.warmup(floats(0, 3, 4), progress=False)
    assert_close(function(floats(1, 2, 2)), floats(1, 2, 2) * 2)
