"""Fork after use: a clear error in the child, or the right answer, never a hang."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.processes import run_script, said_by

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks nothing here")

PREPARED = """
import os, signal, threading, warnings
import jax.numpy as jnp
import numpy as np
from cudagraph_jax import (
    CUDAGraphConfig, CUDAGraphError, CUDAGraphManager, CUDAGraphMode, bucket_jit
)

warnings.simplefilter("ignore")  # JAX and Python warn of every fork

def config(**options):
    return CUDAGraphConfig(capture_sizes=(1, 2, 512), warmup_iterations=1, **options)

def product(x):  # large enough that XLA asks its threads for help, which a child lacks
    return jnp.tanh(x @ x.T).sum(axis=1, keepdims=True) + x

def twice(x):
    return x + x

manager = CUDAGraphManager(config())
function = bucket_jit(product, in_axes=("batch _",), manager=manager)
other = bucket_jit(twice, in_axes=("batch _",), manager=manager)
x = np.ones((512, 512), np.float32)
expected = np.tanh(np.float32(512)) * 512 + x
"""

USED = """
function(x), function(x), manager.execute_or_capture(512, 1, product, x)
"""

FORKED = """
def ends(child):
    return "ended" if os.waitpid(child, 0)[1] == 0 else "hung"

def try_in_child(name, action):
    child = os.fork()
    if child:
        print(f"{name}: {ends(child)}", flush=True)
        return
    signal.alarm(10)  # a child that hangs is killed
    result = {}
    try:
        exec(action, globals(), result)
        right = np.allclose(result.get("result", expected), expected, 1e-4)
        said = "correct" if right else "wrong"
    except CUDAGraphError as error:
        clear = "was forked from one that had used JAX" in str(error) and "spawn" in str(error)
        said = "refused" if clear else str(error)
    except Exception as error:
        said = repr(error)
    print(f"{name}: {said}, ", end="", flush=True)
    os._exit(0)
"""


def said_after_fork(actions, before=USED, after=""):
    """What a child says that does each of the `actions`; the parent goes on, and it ends in time.

    Args:
        actions: Python by name; each is done in a child of its own.
        before: What the parent does first.
        after: What it does when all children have ended.
    """
    ask = f"for name, action in {actions!r}.items():\n    try_in_child(name, action)\n"
    check = "\nassert np.allclose(function(x), expected, 1e-4)\nprint('parent: fine')"
    done = run_script(PREPARED + before + FORKED + ask + after + check)
    assert (done.returncode, done.stderr) == (0, "")
    *said, parent = done.stdout.splitlines()
    assert parent == "parent: fine"
    return said


def all_say(actions, answer):
    """What is said where all children end with the same answer."""
    return [f"{name}: {answer}, {name}: ended" for name in actions]


REFUSED = {
    "vmap": "import jax; jax.vmap(function)(x[None])",
    "jit": "import jax; jax.jit(function)(x)",
    "specification under vmap": """
import jax
jax.vmap(lambda x: manager.execute_or_capture(512, 1, product, x))(x[None])
""",
    "hit": "result = function(x)",
    "miss": "function(x[:1, :3])",
    "other function": "other(x)",
    "specification": "result = manager.execute_or_capture(512, 1, product, x)",
    "entry.replay": "result = function.registry.entries()[0].replay((x,))",
    "replay_graph": "result = manager.replay_graph(512, 1, x)",
    "capture_graph": "manager.capture_graph(1, 8, twice, (1, 8), (1, 8))",
    "registry.capture": "manager.registry.capture(1, 8, twice, (1, 8), (1, 8))",
    "warmup": "other.warmup(x, progress=False)",
    "warmup by several": "other.warmup(x, progress=False, workers=2)",
    "eager": "manager.mode = CUDAGraphMode.NONE; result = function(x)",
    "new manager": "bucket_jit(twice, in_axes=('batch _',), config=config())(x)",
    "child of a child": "child = os.fork()\nif child: raise OSError(ends(child))\nfunction(x)",
}


def test_what_needs_jax_is_refused():
    """Whatever would run or compile in the child is a clear error, however many forks ago."""
    grandchild = REFUSED.copy()
    last = grandchild.pop("child of a child")
    assert said_after_fork(grandchild) == all_say(grandchild, "refused")
    (said,) = said_after_fork({"last": last})
    assert said == "last: refused, last: OSError('ended'), last: ended"


WORKS = {
    "stats": "assert manager.stats()['hits'] == 1",
    "explain": "assert 'captured' in str(function.explain(x))",
    "close": "manager.close()",
    "wait": "manager.wait()",
    "seal": "manager.seal(); assert manager.mode is CUDAGraphMode.REPLAY",
    "with": "with manager: pass",
    "reset": "manager.reset(); assert manager.registry.num_graphs == 0",
}

BUSY = """
entered, release = threading.Event(), threading.Event()
background = manager.dispatcher.capturer.background
assert background.submit("job", lambda: (entered.set(), release.wait(60)))
assert background.submit("waits", lambda: None)
assert entered.wait(60)
"""


def test_what_needs_no_jax_works_while_the_worker_is_busy():
    """The child has no worker, and no job to wait for, whatever the parent's was doing."""
    said = said_after_fork(WORKS, USED + BUSY, "release.set(); manager.wait()")
    assert said == all_say(WORKS, "correct")


def test_eager_calls_are_use():
    """A parent that ran eagerly alone has used JAX: eager calls and captures are refused."""
    actions = {
        "eager": REFUSED["eager"],
        "capture": "manager.mode = CUDAGraphMode.CAPTURE; function(x)",
    }
    before = "manager.mode = CUDAGraphMode.NONE; function(x)"
    assert said_after_fork(actions, before) == all_say(actions, "refused")


def test_a_fork_before_use_works():
    """A child of a process that has used nothing yet captures, replays and captures on the side."""
    actions = {
        "call": REFUSED["hit"],
        "background": """
lazy = bucket_jit(twice, in_axes=("batch _",), config=config(on_miss="background"))
lazy(x), lazy.manager.wait(), lazy(x)
assert lazy.stats()["hits"] == 1, lazy.stats()
""",
    }
    assert said_after_fork(actions, "") == all_say(actions, "correct")


HELD = """
from cudagraph_jax.graphs.replay_counts import SizeHistogram

sizes = manager.registry.sizes
sizes._is_adding = True  # as if a thread of the parent were in the middle of it
"""


def test_what_was_half_done_at_the_fork_does_not_stop_the_child():
    """Another thread of the parent that was counting at the fork leaves nothing taken."""
    actions = {**WORKS, "sizes": "assert manager.sizes(), manager.sizes()"}
    said = said_after_fork(actions, USED + HELD, "")
    assert said == all_say(actions, "correct")


def test_the_package_holds_no_lock_that_a_fork_could_leave_taken():
    """Nothing that a manager and its functions reach is a lock of Python's."""
    said = said_by(USED_ALONE)
    assert said.strip() == "[]"


USED_ALONE = """
import gc, _thread, threading
import numpy as np
from cudagraph_jax import CUDAGraphConfig, bucket_jit

function = bucket_jit(lambda x: x * 2, in_axes="batch seq", config=CUDAGraphConfig(
    capture_sizes=(2,), capture_seq_lens=(4,), on_miss="background"))
function(np.ones((2, 4), np.float32))
function.manager.wait()
function(np.ones((2, 4), np.float32))
kinds = (_thread.LockType, type(threading.RLock()), threading.Condition, threading.Event)
reached, locks, seen = [function], [], set()
while reached:
    found = reached.pop()
    if id(found) in seen or not (
        isinstance(found, (*kinds, dict, list, tuple, set))
        or type(found).__module__.startswith("cudagraph_jax")
    ):
        continue
    seen.add(id(found))
    if isinstance(found, kinds):
        locks.append(found)
    reached += gc.get_referents(found)
print(locks)
"""
