"""Processes of their own: prometheus_client's multi-process mode, and what is imported."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from tests.helpers.processes import run_script, said_by
from tests.helpers.scrapes import samples_of

ROOT = Path(__file__).parents[2]


def worker(script, directory, *arguments):
    """What a script says in multi-process mode, in a process of its own."""
    return run_script(script, *arguments, warnings="error", PROMETHEUS_MULTIPROC_DIR=str(directory))


def merged(directory, name="default"):
    """What a scrape of all processes gives."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))
    return samples_of(registry, name)


WORKER = """
    import os, sys
    import numpy as np
    from cudagraph_jax import CUDAGraphConfig, bucket_jit
    from cudagraph_jax.prometheus import register

    config = CUDAGraphConfig(capture_sizes=(1, 2), warmup_iterations=0)
    function = bucket_jit(lambda x: x * 2, in_axes=("batch seq",), config=config)
    registration = register(function.manager, replay_times=True, interval_s=3600)
    for _ in range(1 + int(sys.argv[1])):
        function(np.ones((2, 3), np.float32))
    function(np.ones((5, 3), np.float32))
    if sys.argv[2] == "update":
        registration.update()
        registration.update()
    print("served", flush=True)
    if sys.argv[2] == "update":
        os._exit(0)  # nothing is pushed at exit then
"""


def test_processes_add_up(tmp_path):
    """In multi-process mode a scrape has the sum of all workers, pushed by update or at exit."""
    for hits, how in ((3, "update"), (4, "exit")):
        done = worker(WORKER, tmp_path, hits, how)
        assert (done.stdout, done.returncode) == ("served\n", 0)
        assert all("ran eagerly at 5x3" in line for line in done.stderr.splitlines())
    found = merged(tmp_path)
    assert found["calls_total replay exact"] == found["replays_total exact"] == 7
    assert found["calls_total capture miss"] == found["calls_total eager overflow"] == 2
    assert found["captures_total"] == found["compile_seconds_count"] == 2
    assert found["replay_duration_seconds_count"] == 7
    assert found["real_elements_total"] == 42
    assert found["graphs"] == 2


TICKING = """
    import gc, threading
    import numpy as np
    from cudagraph_jax import CUDAGraphConfig, bucket_jit
    from cudagraph_jax.prometheus import register
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    def value(name):
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return registry.get_sample_value("cudagraph_jax_" + name, {"manager": "default"})

    def thread():
        found = [one for one in threading.enumerate() if one.name == "cudagraph-jax-metrics"]
        return found[0] if found else None

    config = CUDAGraphConfig(capture_sizes=(1, 2), warmup_iterations=0)
    function = bucket_jit(lambda x: x * 2, in_axes=("batch seq",), config=config)
    registration = register(function.manager, interval_s=0.001)
    assert thread().daemon
    function(np.ones((2, 3), np.float32))
    while value("captures_total") != 1:
        pass
    {then}
"""

ENDINGS = {
    "unregister": "registration.unregister()\nassert value('graphs') == 0",
    "gone": "del function\ngc.collect()",
    "exit": "raise SystemExit",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_thread(tmp_path, ending):
    """A daemon thread pushes every so often, and ends with the registration and its manager."""
    checks = (
        "\nwhile thread() is not None: thread().join(10)\n"
        "assert value('captures_total') == 1\nassert value('graphs') == 0"
    )
    then = textwrap.indent(ENDINGS[ending] + checks, "    ").strip()
    done = worker(TICKING.replace("{then}", then), tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    assert merged(tmp_path)["captures_total"] == 1


FORKING = """
    import os, sys, warnings
    import numpy as np
    warnings.simplefilter("ignore")  # the interpreter warns of forks beside threads
    from cudagraph_jax import CUDAGraphConfig, bucket_jit
    from cudagraph_jax.dispatch.decision import Reason
    from cudagraph_jax.prometheus import register

    config = CUDAGraphConfig(capture_sizes=(1, 2), warmup_iterations=0)
    function = bucket_jit(lambda x: x * 2, in_axes=("batch seq",), config=config)
    register(function.manager, interval_s=3600)
    function.manager.dispatcher.outcomes.add("eager", Reason.OVERFLOW)  # before JAX is used
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            function(np.ones((2, 3), np.float32))
            sys.exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
"""


def test_forked_workers(tmp_path):
    """Workers forked after the registration push their own counts, and none of the parent's."""
    done = worker(FORKING, tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    found = merged(tmp_path)
    assert found["captures_total"] == found["compile_seconds_count"] == 2
    assert found["calls_total eager overflow"] == 1


def test_the_missing_package_is_named():
    """Without prometheus_client the import says what to install, word for word."""
    script = """
        import sys
        sys.modules["prometheus_client"] = None
        import cudagraph_jax
        try:
            import cudagraph_jax.prometheus
        except ImportError as error:
            print(error)
    """
    assert said_by(script) == (
        "cudagraph_jax.prometheus needs the package prometheus_client, which is not installed: "
        "run pip install 'cudagraph-jax[prometheus]'\n"
    )


def test_the_package_does_not_import_it():
    """Importing the package imports no prometheus_client."""
    script = "import sys, cudagraph_jax; print('prometheus_client' in sys.modules)"
    assert said_by(script) == "False\n"
