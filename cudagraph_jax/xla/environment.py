"""What the package runs on."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import version

import jax

from cudagraph_jax.version import __version__


def environment(*, backend_started: bool) -> dict[str, str]:
    """Versions and devices, as labels and values.

    Args:
        backend_started: Whether JAX's backend is known to run. The devices are named only then:
            asking for them would start one.
    """
    found = {
        "cudagraph_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "Python": platform.python_version(),
        "system": platform.platform(),
    }
    if not backend_started:
        return {**found, "backend": "not known before the first capture"}
    kinds = Counter(device.device_kind for device in jax.local_devices())
    devices = ", ".join(f"{number} × {kind}" for kind, number in sorted(kinds.items()))
    return {**found, "backend": f"{jax.default_backend()}: {devices}"}
