"""Settings of all tests."""

import gc
import os
import shutil
import signal
import tempfile
import threading
from importlib.metadata import version

# Most of a tiny function's compile is LLVM's optimisation, a third of the suite's time. This is
# JAX's own switch; with JAX_DISABLE_MOST_OPTIMIZATIONS=0 the suite passes, too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Of a small function's other 36 ms MLIR takes half, in fusions (jaxlib 0.12 refuses to start with
# that flag), and 3 go into parts for threads to compile.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_parallel_codegen_split_count=1"
        + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
    )
# A compile gives memory back that the next one asks for again, a millisecond of it. Processes read
# this when they start, as workers and scripts do after it.
os.environ.setdefault("MALLOC_TOP_PAD_", str(2**26))

import jax
import pytest
from hypothesis import Phase, settings

# The first example of a property may trace or compile, which no deadline foresees. Explaining a
# failure traces each line of what shrinks it: tests of the kit fail on purpose, at twice the price.
settings.register_profile(
    "usual", deadline=None, phases=[phase for phase in Phase if phase is not Phase.explain]
)
settings.register_profile("thorough", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))

# A store waits for the disk with every write. A file system in memory has none, and 20 s go.
IN_MEMORY = "/dev/shm"
if (
    "TMPDIR" not in os.environ
    and os.access(IN_MEMORY, os.W_OK)
    and shutil.disk_usage(IN_MEMORY).free > 2**31
):
    os.environ["TMPDIR"] = tempfile.tempdir = IN_MEMORY

# Several workers, and the processes that they start, share a GPU: none takes most of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# The background of a shell ignores Ctrl-C, and so would all processes that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if version("jax").startswith("0.10."):
    # Lowering a small function takes 6 ms, of which an MLIR context takes 4. From 0.11 on JAX
    # itself has each thread lower ten programs in one.
    from jax._src.interpreters import mlir

    make_context, kept = mlir.make_ir_context, threading.local()

    def context_of_thread():
        """The context of this thread's last program, ten times."""
        if not getattr(kept, "programs", 0):
            kept.context, kept.programs = make_context(), 10
        kept.programs -= 1
        return kept.context

    mlir.make_ir_context = context_of_thread

# Nothing of what pytest collects goes before the end: looking through it takes 3 s.
gc.disable()


def pytest_collection_finish():
    # Tracing and lowering make many objects and few cycles: by default looking takes 3 % of all.
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def earlier_objects_are_not_looked_through():
    """JAX keeps a lot of each module, so that a `gc.collect()` would come to take half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def settings_of_accelerators():
    """XLA optimises, and gives products of float32 matrices all digits, of which GPUs omit half."""
    if jax.default_backend() != "cpu":
        jax.config.update("jax_disable_most_optimizations", False)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
        jax.config.update("jax_default_matmul_precision", "highest")
        os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # of the processes that tests start
