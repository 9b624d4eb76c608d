"""Functions over a mesh of eight devices; the checks run in one process of their own."""

import json
import os
import re

import pytest

from tests.helpers.devices import PROGRAMS, run_program
from tests.helpers.processes import run_script

PROGRAM = "on_a_mesh.py"
CHECKS = re.findall(r"^@check\ndef (\w+)", (PROGRAMS / PROGRAM).read_text("utf-8"), re.MULTILINE)

AFTER_A_RESTART = "a_restarted_process_loads_what_is_over_a_mesh"


def run(*arguments: str) -> object:
    done = run_program(PROGRAM, *arguments, jax_num_cpu_devices=8)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # JAX 0.12 prints where a constraint is uneven


# Two processes that compile over eight devices.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def raised(request, tmp_path_factory):
    """What each check raised that is asked for, as text; run in the order of their tests."""
    tests = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params["check"] for item in tests if hasattr(item, "callspec")]
    store = str(tmp_path_factory.mktemp("store"))
    if AFTER_A_RESTART in asked:
        run(store, "before")
    return run(store, *asked)


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check, raised):
    """What the check's name says is so on a mesh of two by four."""
    assert not raised[check], raised[check]


def test_the_first_mesh_of_a_process():
    """Hits under the first mesh that a process has are not served by what was captured without."""
    done = run_script(
        """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, get_abstract_mesh
        import cudagraph_jax

        @cudagraph_jax.bucket_jit(in_axes="batch")
        def devices(x):
            return x * get_abstract_mesh().shape.get("data", 1)

        for x in (np.ones(4, np.float32), jnp.ones(4)):
            assert devices(x)[0] == devices(x)[0] == 1
        for x in (np.ones(4, np.float32), jnp.ones(4)):
            with jax.set_mesh(Mesh(jax.devices(), ("data",))):
                assert devices(x)[0] == 8
            assert devices(x)[0] == 1
        """,
        XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
    )
    assert done.returncode == 0, done.stderr
