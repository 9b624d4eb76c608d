"""Arrays on another device than the default one, and 64-bit arithmetic."""

from __future__ import annotations

import pytest

from tests.helpers.devices import run_program


@pytest.mark.parametrize(
    ("script", "settings", "said"),
    [
        (
            "on_two_devices.py",
            {"jax_num_cpu_devices": 2},
            "right on both devices",
        ),
        (
            "on_default_devices.py",
            {"jax_num_cpu_devices": 2},
            "each on its own device",
        ),
        (
            "padded_on_two_devices.py",
            {"jax_num_cpu_devices": 2},
            "padded on both devices",
        ),
        ("with_x64.py", {"jax_enable_x64": True}, "right in 64 bits"),
    ],
)
def test_in_a_process_of_its_own(script, settings, said):
    """Answers are right on a second device, and in 64 bits where x64 is on."""
    done = run_program(script, **settings)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
