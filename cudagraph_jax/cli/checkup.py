"""What the doctor looked at, and what looks wrong in it: pure, and so testable without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cudagraph_jax.modes import DEFAULT_COMMANDS

MIN_JAX = (0, 10)
"""As in the dependencies of the package."""
MIN_CUDA = (12, 3)
"""XLA records command buffers from this version on (docs/xla.md, "Command buffers")."""
_COMMAND_BUFFER_FLAG = re.compile(r"--xla_gpu_enable_command_buffer=(\S*)")
# What each of these settings of JAX does to a server, and its name.
_SETTINGS = {
    "jax_enable_x64": (
        "Python and NumPy numbers stay 64 bits wide, which GPUs compute slowly",
        "switch it off (JAX_ENABLE_X64) unless the model needs float64",
    ),
    "jax_debug_nans": (
        "every output is copied to the host and searched, and padded rows may divide by zero",
        "switch it off (JAX_DEBUG_NANS) where you serve",
    ),
    "jax_debug_infs": (
        "every output is copied to the host and searched",
        "switch it off (JAX_DEBUG_INFS) where you serve",
    ),
    "jax_disable_jit": (
        "functions that jax.jit should compile run one operation at a time",
        "switch it off (JAX_DISABLE_JIT) where you serve",
    ),
}


class Finding(NamedTuple):
    """Something that looks wrong.

    Attributes:
        what: What it is, and why it matters.
        remedy: What to do.
    """

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """Devices of one kind.

    Attributes:
        kind: As JAX calls it.
        count: How many this process may use.
        memory_bytes: What XLA may use of each; None where the backend does not say.
    """

    kind: str
    count: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """Optional dependencies.

    Attributes:
        name: Of the extra.
        missing: Those that are not installed.
        install: The command that installs them.
    """

    name: str
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One machine and one process, as far as they matter here.

    Attributes:
        versions: Of Python and of the packages that are installed.
        backend: What JAX runs on; None if it cannot start.
        backend_error: Why not.
        platform_version: What the backend says of itself.
        devices: Those of the backend.
        gpus: NVIDIA GPUs that the system shows, whatever JAX sees.
        cpu_count: Cores that this process may use.
        scopes: Each `CommandBufferScope`, and XLA's words where it refuses its options.
        commands: Each type of command that XLA may record, likewise.
        compiles_reported: Whether `jax.monitoring` reports compiles; None if unknown.
        settings: JAX's own settings.
        environment: Environment variables that JAX and XLA read, where they are set.
        extras: The package's optional dependencies.
    """

    versions: Mapping[str, str]
    backend: str | None
    backend_error: str | None = None
    platform_version: str = ""
    devices: tuple[Devices, ...] = ()
    gpus: tuple[str, ...] = ()
    cpu_count: int
    scopes: Mapping[str, str | None] = field(default_factory=dict)
    commands: Mapping[str, str | None] = field(default_factory=dict)
    compiles_reported: bool | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    extras: tuple[Extra, ...] = ()


def findings(snapshot: Snapshot) -> tuple[Finding, ...]:
    """What looks wrong, and what to do about it; the most serious first."""
    checks = (_backend, _unused_gpu, _versions, _plugins, _cuda, _flags, _options, _settings)
    return tuple(finding for check in (*checks, _rest) for finding in check(snapshot))


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, three at the most: (0, 12, 0) for "0.12.0.1" and "0.12.0rc1"."""
    numbers = re.match(r"\d+(\.\d+){0,2}", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _backend(snapshot: Snapshot) -> Iterator[Finding]:
    if snapshot.backend_error is None:
        return
    causes = [
        f"{name}={snapshot.environment[name]}"
        for name in ("JAX_PLATFORMS", "XLA_FLAGS")
        if snapshot.environment.get(name)
    ]
    remedy = f"try without {' and '.join(causes)}" if causes else "reinstall jax and jaxlib"
    yield Finding(f"JAX cannot start ({snapshot.backend_error})", remedy)


def _unused_gpu(snapshot: Snapshot) -> Iterator[Finding]:
    if not snapshot.gpus or snapshot.backend != "cpu":
        return
    what = f"the system shows a GPU ({snapshot.gpus[0]}), but JAX runs on the CPU"
    platforms = snapshot.environment.get("JAX_PLATFORMS")
    if platforms:
        yield Finding(what, f"unset JAX_PLATFORMS={platforms}")
    elif not _plugin_versions(snapshot):
        yield Finding(what, "run pip install 'cudagraph-jax[cuda12]' (or [cuda13])")
    else:
        yield Finding(
            what, "run JAX_PLATFORMS=cuda python -c 'import jax; jax.devices()' to see why"
        )


def _versions(snapshot: Snapshot) -> Iterator[Finding]:
    jax, jaxlib = snapshot.versions["jax"], snapshot.versions["jaxlib"]
    if release(jax) < MIN_JAX:
        oldest = ".".join(map(str, MIN_JAX))
        yield Finding(
            f"jax {jax} is older than {oldest}, the oldest that is supported",
            f"run pip install --upgrade 'jax>={oldest}'",
        )
    if release(jax) != release(jaxlib):
        yield Finding(
            f"jax {jax} and jaxlib {jaxlib} are of different versions",
            f"run pip install jax=={jax} jaxlib=={jax}",
        )


def _plugins(snapshot: Snapshot) -> Iterator[Finding]:
    jaxlib = snapshot.versions["jaxlib"]
    plugins = _plugin_versions(snapshot)
    for name, version in plugins.items():
        if release(version) != release(jaxlib):
            yield Finding(
                f"{name} {version} and jaxlib {jaxlib} are of different versions",
                f"run pip install {name}=={jaxlib}",
            )
    if len({name.split("-")[1] for name in plugins}) > 1:
        yield Finding(
            f"plugins for two versions of CUDA are installed ({', '.join(plugins)})",
            "uninstall those of one of them",
        )


def _plugin_versions(snapshot: Snapshot) -> dict[str, str]:
    return {
        name: version
        for name, version in snapshot.versions.items()
        if re.fullmatch(r"jax-cuda\d+-(plugin|pjrt)", name)
    }


def _cuda(snapshot: Snapshot) -> Iterator[Finding]:
    # "PJRT C API\ncuda 12090": 1000 * major + 10 * minor.
    found = re.search(r"\bcuda (\d+)", snapshot.platform_version)
    if found is None:
        return
    cuda = (int(found[1]) // 1000, int(found[1]) % 1000 // 10)
    if cuda < MIN_CUDA:
        yield Finding(
            "CUDA {}.{} is older than {}.{}, from which on XLA records command buffers".format(
                *cuda, *MIN_CUDA
            ),
            "update the driver and run pip install 'cudagraph-jax[cuda12]'",
        )


def _flags(snapshot: Snapshot) -> Iterator[Finding]:
    recorded = commands_of(snapshot.environment.get("XLA_FLAGS", ""))
    if recorded is None or "FUSION" in recorded:
        return
    which = "fusions" if recorded else "anything"
    yield Finding(
        f"XLA_FLAGS keeps XLA from recording {which} in command buffers: most of a graph is gone",
        "leave xla_gpu_enable_command_buffer out of XLA_FLAGS; command_buffers in "
        "CUDAGraphConfig says it for each function",
    )


def commands_of(xla_flags: str) -> frozenset[str] | None:
    """The types of command that flags let XLA record; None where they say nothing of it."""
    given = _COMMAND_BUFFER_FLAG.findall(xla_flags)
    if not given:
        return None
    items = [item.upper() for item in given[-1].strip("\"'").split(",") if item]
    if not items or items[0][0] not in "+-":
        return frozenset(items)
    added = {item[1:] for item in items if item[0] == "+"}
    removed = {item[1:] for item in items if item[0] == "-"}
    return (frozenset(DEFAULT_COMMANDS) | added) - removed


def _options(snapshot: Snapshot) -> Iterator[Finding]:
    for scope, refused in snapshot.scopes.items():
        if refused is not None:
            yield Finding(
                f"this jaxlib refuses the options of CommandBufferScope.{scope} ({refused})",
                "use another scope, or a jax that is supported",
            )


def _settings(snapshot: Snapshot) -> Iterator[Finding]:
    for name, (effect, remedy) in _SETTINGS.items():
        if snapshot.settings.get(name):
            yield Finding(f"{name} is on: {effect}", remedy)


def _rest(snapshot: Snapshot) -> Iterator[Finding]:
    if snapshot.compiles_reported is False:
        yield Finding(
            "this JAX does not report its compiles: no_compiles() stops traces, but not a "
            "Lowered.compile()",
            "use a jax that is supported",
        )
    if snapshot.cpu_count == 1:
        yield Finding(
            "this process may use one CPU core: XLA compiles, serves and runs Python on it",
            'give it two or more, above all with on_miss="background"',
        )
