"""XLA's own CUDA runtime records and replays, on a stand-in for the driver that runs no kernel.

What it answers is nobody's; what it asks of the driver is what it asks on a GPU. It takes JAX's
CUDA plugin, which `make test-gpu-compiler` adds, and a C compiler.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jaxlib.version
import pytest

from cudagraph_jax.xla.gpus import has_cuda_plugin

PROGRAMS = Path(__file__).parents[1] / "helpers" / "programs"
LIBRARIES = (
    "libcuda.so.1",
    "libcudart.so.13",
    "libcublas.so.13",
    "libcublasLt.so.13",
    "libcupti.so.13",
    "libnvidia-ml.so.1",
)
COMPILER = shutil.which("cc") or ""
ONE_LAUNCH = {"kernels": 0, "launches": 1, "nodes": 0, "updates": 0, "instances": 0}

pytestmark = [
    pytest.mark.skipif(not has_cuda_plugin(), reason="JAX's CUDA plugin is not installed"),
    pytest.mark.skipif(not COMPILER, reason="there is no C compiler"),
    pytest.mark.skipif(
        # Its compiler does not do without cuDNN.
        jaxlib.version.__version_info__ < (0, 11),
        reason="jaxlib is older than 0.11",
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `standin_replays.py` prints."""
    libraries = tmp_path_factory.mktemp("standin")
    built = libraries / LIBRARIES[0]
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-O1", "-o", built, PROGRAMS / "standin_cuda.c"], check=True
    )
    for name in LIBRARIES[1:]:
        shutil.copy(built, libraries / name)
    plugin = Path(importlib.import_module("jax_plugins.xla_cuda13").__file__ or "").parent
    cuda = plugin.parents[1] / "nvidia" / "cu13"
    done = subprocess.run(
        [sys.executable, PROGRAMS / "standin_replays.py"],
        env={
            "HOME": os.environ.get("HOME", ""),
            "JAX_PLATFORMS": "standin",
            "LD_LIBRARY_PATH": str(libraries),
            "PATH": f"{cuda / 'bin'}:{os.environ['PATH']}",
            # Another name than cuda, for which JAX looks for a device file.
            "PJRT_NAMES_AND_LIBRARY_PATHS": f"standin:{plugin / 'xla_cuda_plugin.so'}",
            "PYTHONPATH": str(PROGRAMS.parents[2]),
            "XLA_FLAGS": f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={cuda}",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        },
        capture_output=True,
        check=False,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_hot_loop_replays(found):
    """With donated state the first run records, and each one after it is one launch."""
    first, *others = found["hot_loop"]["first"]
    assert (first["instances"], first["launches"], first["kernels"]) == (1, 1, 0)
    assert first["nodes"] >= 6
    assert others == [ONE_LAUNCH, ONE_LAUNCH]


def test_a_profile_shows_it(found):
    """`profile_replays` sees each launch, no update, and calls the bucket replaying."""
    assert found["hot_loop"]["profile"] == {
        "replays": 20,
        "executed": 20,
        "updated": 0,
        "recorded": 0,
        "moved": [],
        "state": "replaying",
    }


def test_a_decode_step_replays(found):
    """A decode step with all of its state donated is one launch, again and again."""
    assert found["decoding"]["usual"] == ONE_LAUNCH
    profile = found["decoding"]["profile"]
    assert (profile["executed"], profile["updated"], profile["recorded"]) == (20, 0, 0)
    assert (profile["moved"], profile["state"]) == ([], "replaying")


def test_what_moves_is_updated_and_named(found):
    """State that lies elsewhere each time has the graph updated each time, and is named."""
    profile = found["moving"]["profile"]
    assert profile["executed"] == profile["updated"] == 20
    assert profile["recorded"] == 0
    assert profile["moved"] == ["state"]
    assert profile["state"] == "warmed"


def test_a_late_capture_has_the_others_recorded_again(found):
    """The next replay of another bucket records anew, and the one after it is a launch again."""
    assert found["late_capture"]["usual"] == ONE_LAUNCH
    first, second = found["late_capture"]["after"]
    assert (first["instances"], first["launches"]) == (1, 1)
    assert second == ONE_LAUNCH


def test_scopes(found):
    """NONE launches kernels one by one; a scan is a launch and an update for each layer."""
    assert found["scopes"]["none"]["launches"] == 0
    assert found["scopes"]["none"]["kernels"] >= 6
    assert found["scopes"]["scan"]["launches"] >= 6
    assert found["scopes"]["scan"]["updates"] >= 6
    assert found["scopes"]["unrolled"] == ONE_LAUNCH
