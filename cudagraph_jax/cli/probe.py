"""Gathers what the doctor looks at; starts JAX's backend."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from jax.extend import backend as jax_backend
from jax.stages import Lowered

from cudagraph_jax._base.text import Json, error_text
from cudagraph_jax.cli.checkup import Devices, Extra, Snapshot
from cudagraph_jax.demo.bert.model_folder import PACKAGE as MODEL_PACKAGE
from cudagraph_jax.demo.requirements import MODEL_INSTALL
from cudagraph_jax.modes import CommandBufferScope
from cudagraph_jax.xla.compiles import compiles_are_reported
from cudagraph_jax.xla.environment import cores, host_fields, jaxlib_version

PACKAGES = (
    "cudagraph-jax",
    "jax",
    "jaxlib",
    "numpy",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
)
EXTRAS = {
    "demo": ("rich", "safetensors", "tokenizers"),
    "rich": ("rich",),
    "plot": ("matplotlib",),
    "prometheus": ("prometheus_client",),
    "ray": ("ray",),
    "serve": (
        "httptools",
        "orjson",
        "prometheus_client",
        "pydantic",
        "starlette",
        "uvicorn",
        "uvloop",
    ),
    "store": ("filelock",),
    "testing": ("hypothesis",),
}
"""The modules of each extra; those of others that it asks for are theirs."""
COMMANDS = (
    "FUSION",
    "CUBLAS",
    "CUBLASLT",
    "CUDNN",
    "CUSTOM_CALL",
    "CONDITIONAL",
    "WHILE",
    "CONVOLUTION",
    "DYNAMIC_SLICE_FUSION",
    "DYNAMIC_SLICE_COPY_FUSION",
    "COLLECTIVES",
    "COLLECTIVES_KERNEL",
    "HOST_EXECUTE",
)
"""Types of command that some jaxlib knows (XLA, `DebugOptions.CommandBufferCmdType`)."""
SETTINGS = (
    "jax_enable_x64",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_disable_jit",
    "jax_default_matmul_precision",
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
ENVIRONMENT = (
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "CUDA_VISIBLE_DEVICES",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
_MACHINE = (
    "jax",
    "jaxlib",
    "xla",
    "platform",
    "device_kind",
    "machine",
    "cpu",
    "cpu_features",
    "xla_flags",
)

_SECONDS = 120
Run = Callable[..., subprocess.CompletedProcess[str]]


def gather(
    *,
    environ: Mapping[str, str] = os.environ,
    run: Run = subprocess.run,
    proc: Path = Path("/proc/driver/nvidia/gpus"),
) -> Snapshot:
    """This machine and this process.

    Args:
        environ: Environment variables.
        run: Runs another program.
        proc: Where Linux shows NVIDIA's GPUs.
    """
    error = _cannot_start(environ, run)
    lowered = None if error else jax.jit(lambda x: x + 1).lower(np.float32(0))
    return Snapshot(
        versions={
            "python": platform.python_version(),
            # Where the metadata of a package is missing, its own word for it.
            **{"jax": jax.__version__, "jaxlib": jaxlib_version(), **_installed(PACKAGES)},
        },
        backend=None if error else jax.default_backend(),
        backend_error=error,
        platform_version="" if error else str(jax_backend.get_backend().platform_version),
        devices=() if error else _devices(jax.devices()),
        gpus=_gpus(run, proc, environ.get("PATH", "")),
        cpu_count=cores(),
        scopes={} if lowered is None else _scopes(lowered),
        commands={} if lowered is None else _commands(lowered),
        compiles_reported=None if error else compiles_are_reported(),
        settings={name: getattr(jax.config, name, None) for name in SETTINGS},
        environment={name: environ[name] for name in ENVIRONMENT if name in environ},
        extras=tuple(_extras()),
    )


def machine_fields(*, backend_starts: bool) -> dict[str, Json]:
    """What must be the same for a stored executable to be loaded here; settings of JAX aside.

    Args:
        backend_starts: Whether JAX can; else the versions are all that is known.
    """
    if not backend_starts:
        return {"jax": jax.__version__, "jaxlib": jaxlib_version()}
    fields = host_fields(jax.local_devices())
    return {name: fields[name] for name in _MACHINE if name in fields}


def refused(lowered: Lowered, options: Mapping[str, str]) -> str | None:
    """What XLA says against compiler options; None if it accepts them.

    Args:
        lowered: Something small.
        options: By name.
    """
    try:
        lowered.compile(compiler_options=dict(options))
    except Exception as error:
        return _first_line(error_text(error))
    return None


def _scopes(lowered: Lowered) -> dict[str, str | None]:
    return {scope.name: refused(lowered, scope.compiler_options()) for scope in CommandBufferScope}


def _commands(lowered: Lowered) -> dict[str, str | None]:
    return {name: refused(lowered, {"xla_gpu_enable_command_buffer": name}) for name in COMMANDS}


def _cannot_start(environ: Mapping[str, str], run: Run) -> str | None:
    if environ.get("XLA_FLAGS"):
        # A flag that XLA does not know ends the process that starts it: not this one.
        trial = _output(run, [sys.executable, "-c", "import jax; jax.devices()"])
        if trial.returncode != 0:
            return _last_words(trial)
    try:
        jax.devices()
    except Exception as error:
        words = error_text(error) or "it says no more"
        return _first_line(f"{type(error).__name__}: {words}")
    return None


def _last_words(trial: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in trial.stderr.splitlines() if line.strip()]
    fatal = [line for line in lines if "XLA_FLAGS" in line]
    words = (fatal or lines or [f"exit status {trial.returncode}"])[-1]
    # Without "F1123 22:59:11.104379 20537 parse_flags_from_env.cc:234] ".
    return re.sub(r"^F\d+ [^\]]*\] ", "", words)


def _devices(devices: Iterable[jax.Device]) -> tuple[Devices, ...]:
    kinds = Counter((device.device_kind, _memory_bytes(device)) for device in devices)
    return tuple(
        Devices(kind=kind, count=count, memory_bytes=memory)
        for (kind, memory), count in kinds.items()
    )


def _memory_bytes(device: jax.Device) -> int | None:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else int(limit)


def _gpus(run: Run, proc: Path, search: str) -> tuple[str, ...]:
    """The names of NVIDIA's GPUs, as its own tool or the kernel's driver gives them."""
    if shutil.which("nvidia-smi", path=search):
        names = _output(run, ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
        if names.returncode == 0 and names.stdout.strip():
            return tuple(line.strip() for line in names.stdout.splitlines() if line.strip())
    return tuple(f"NVIDIA {place.name}" for place in sorted(proc.glob("*")))


def _output(run: Run, command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return subprocess.CompletedProcess(command, 1, "", error_text(error))


def _installed(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _extras() -> Iterable[Extra]:
    for name, modules in EXTRAS.items():
        missing = tuple(module for module in modules if find_spec(module) is None)
        yield Extra(name=name, missing=missing, install=f"pip install 'cudagraph-jax[{name}]'")
    model = () if _installed([MODEL_PACKAGE]) else (MODEL_PACKAGE,)
    yield Extra(name="the demo's model", missing=model, install=MODEL_INSTALL)


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]
