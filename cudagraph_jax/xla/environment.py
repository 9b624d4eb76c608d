"""What the package runs on."""

from __future__ import annotations

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
from jaxlib import version as _jaxlib

from cudagraph_jax._base.text import Json
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
        "jaxlib": jaxlib_version(),
        "Python": platform.python_version(),
        "system": platform.platform(),
    }
    if not backend_started:
        return {**found, "backend": "not known before the first bucket"}
    kinds = Counter(device.device_kind for device in jax.local_devices())
    devices = ", ".join(f"{number} × {kind}" for kind, number in sorted(kinds.items()))
    return {**found, "backend": f"{jax.default_backend()}: {devices}"}


def jaxlib_version() -> str:
    """That of the code which runs; what is installed may have been exchanged since it started."""
    return str(_jaxlib.__version__)


_PLUGINS = ("jax-cuda12-pjrt", "jax-cuda13-pjrt", "jax-rocm60-pjrt", "jax-rocm7-pjrt", "libtpu")
_FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_NO_MATTER = (
    "compilation_cache",
    "persistent_cache",
    "logging_level",
    "log_compiles",
    "debug_log",
    "detailed_logging",
    "log_checkpoint",
    "traceback",
    "transfer",
    "dump",
    "visible_devices",
    "cross_host",
    "mtls",
    "distributed",
    "jax_platform",
    "timeout",
    "explain_cache",
    "pprint",
    "garbage",
    "leaked_clients",
    "checking_leaks",
    "share_binary",
    "preemption",
    "proxy_envs",
    "recoverability",
    "warn_bytes",
    "report_frames",
    "thread_guard",
    "jax_no_tracing",
    "jax_no_execution",
    "default_device",
    "num_cpu_devices",
    "source_url",
    "topology",
    "tracer_error",
    "jax_enable_checks",
    "jax_xla_backend",
    "client_create_options",
)
"""Parts of the names of JAX's settings that change no program."""


def host_fields(devices: Sequence[jax.Device]) -> dict[str, Json]:
    """What must be the same for an executable to be loaded, by name.

    Args:
        devices: Those that it runs on, in its order.
    """
    kind = devices[0]
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib_version(),
        "xla": [str(kind.client.platform_version), *plugin_versions()],
        "platform": kind.platform,
        "device_kind": sorted({device.device_kind for device in devices}),
        "device_count": jax.local_device_count() if are_own(devices) else jax.device_count(),
        "devices": [device.id for device in devices],
        "machine": platform.machine(),
        **(_cpu() if kind.platform == "cpu" else {}),
        "xla_flags": list(_xla_flags()),
        **_settings(),
    }


def are_own(devices: Iterable[jax.Device]) -> bool:
    """Whether all are of this process, so that it does not matter which others its job has."""
    return all(device.process_index == jax.process_index() for device in devices)


def cores() -> int:
    """How many processor cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


@cache
def _xla_flags() -> tuple[str, ...]:
    """Flags in their order, since the last of several counts; dumps change nothing.

    As they are when they are first asked for: XLA reads them once. A value that does not begin with
    a hyphen is the name of a file of flags.

    Raises:
        OSError: The file is there and cannot be read now.
    """
    found = []
    for variable in _FLAG_VARIABLES:
        value = os.environ.get(variable, "").strip()
        if value and not value.startswith("-"):
            with suppress(FileNotFoundError):
                value = Path(value).read_text(encoding="utf-8", errors="replace")
        found += [flag for flag in value.split() if not flag.startswith("--xla_dump")]
    return tuple(found)


def _settings() -> dict[str, Json]:
    """JAX's settings, also those of this thread; a setting that is new to us counts."""
    values: dict[str, object] = jax.config.values
    found: dict[str, Json] = {}
    for name in _names_that_matter(frozenset(values)):
        value = values[name]
        if value is not None:
            text = f"setting {name}"
            found[text] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


@cache
def _names_that_matter(names: frozenset[str]) -> tuple[str, ...]:
    """The settings that may change a program; there are hundreds, and they seldom become more."""
    return tuple(name for name in sorted(names) if not any(part in name for part in _NO_MATTER))


@cache
def plugin_versions() -> tuple[str, ...]:
    """The runtimes of accelerators that were installed when it was first asked.

    Nothing that they load says its version, so ask early: an upgrade of a live server's packages
    comes later.

    Raises:
        OSError: The system refuses to read what is installed.
    """
    found = []
    for name in _PLUGINS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return tuple(found)


@cache
def _cpu() -> dict[str, str]:
    """The processor and its instructions: code for one may be illegal on another.

    Raises:
        OSError: The system knows them and does not say so now.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {"cpu": platform.processor() or "unknown"}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    first = {name.strip(): value.strip() for name, _, value in lines}
    features = " ".join(sorted((first.get("flags") or first.get("Features", "")).split()))
    return {
        "cpu": first.get("model name", platform.processor() or "unknown"),
        "cpu_features": hashlib.sha256(features.encode()).hexdigest()[:16],
    }
