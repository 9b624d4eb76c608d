"""Fork after use: a clear error in the child, never a hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks nothing here")

SCRIPT = """
import os, signal, sys, warnings
import numpy as np
from cudagraph_jax import CUDAGraphConfig, CUDAGraphError, CUDAGraphManager, bucket_jit

warnings.simplefilter("ignore")  # JAX warns of every fork
config = CUDAGraphConfig(capture_sizes=(1, 2), capture_seq_lens=(4, 8), warmup_iterations=1)
manager = CUDAGraphManager(config)

def double(x):
    return x * 2

def twice(x):
    return x + x

function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
other = bucket_jit(twice, in_axes=("batch seq",), manager=manager)
x = np.ones((2, 4), np.float32)
function(x), function(x), manager.execute_or_capture(2, 4, double, x)
{before}
child = os.fork()
if child == 0:
    signal.alarm(8)  # a child that hangs is killed
    try:
        {action}
        print("correct" if result is None or np.array_equal(result, x * 2) else "wrong", flush=True)
    except CUDAGraphError as error:
        print("refused:", error, flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert np.array_equal(function(x), x * 2)
print("parent is fine, child ended with", status)
"""

ACTIONS = {
    "hit": ("", "result = function(x)"),
    "miss": ("", "result = function(x[:1, :3]); result = None"),
    "other function": ("", "result = other(x)"),
    "specification": ("", "result = manager.execute_or_capture(2, 4, double, x)"),
    "replay_graph": ("", "result = manager.replay_graph(2, 4, x)"),
    "capture_graph": ("", "result = manager.capture_graph(1, 8, double, (1, 8)) and None"),
    "warmup": ("", "result = other.warmup(x, progress=False) and None"),
    "after reset": ("manager.reset()", "result = function(x)"),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_forked_child(action):
    """Whatever a forked child asks for is refused clearly or done right; the parent goes on."""
    before, work = ACTIONS[action]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before, action=work)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert said[-1] == "parent is fine, child ended with 0"
    assert said[0] == "correct" or (said[0].startswith("refused:") and "spawn" in said[0])
