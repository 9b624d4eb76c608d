"""What looks wrong in a snapshot."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from cudagraph_jax.cli.checkup import MIN_JAX, Finding, Snapshot, commands_of, findings, release

GOOD = Snapshot(
    versions={"python": "3.12.1", "jax": "0.12.0.1", "jaxlib": "0.12.0", "numpy": "2.0.0"},
    backend="gpu",
    platform_version="PJRT C API\ncuda 12090",
    gpus=("NVIDIA H100",),
    cpu_count=8,
    scopes={"AUTO": None, "FULL": None},
    commands={"FUSION": None, "NOPE": "INVALID_ARGUMENT"},
    compiles_reported=True,
    settings={"jax_enable_x64": False, "jax_compilation_cache_dir": "/tmp"},
    environment={"XLA_FLAGS": "--xla_dump_to=/tmp"},
)
PLUGIN = {**GOOD.versions, "jax-cuda12-plugin": "0.12.0", "jax-cuda12-pjrt": "0.12.0"}


def found(**changes):
    """What is found in a good snapshot with changes."""
    return findings(dataclasses.replace(GOOD, **changes))


@pytest.mark.parametrize(
    "changes", [{}, {"versions": PLUGIN}, {"backend": "cpu", "gpus": (), "platform_version": "cpu"}]
)
def test_nothing_is_wrong(changes):
    """A GPU that is used, its plugins, and a machine without a GPU are in order."""
    assert found(**changes) == ()


@pytest.mark.parametrize(
    ("changes", "what", "remedy"),
    [
        (
            {"backend": None, "backend_error": "RuntimeError: no"},
            "JAX cannot start (RuntimeError: no)",
            "try without XLA_FLAGS=--xla_dump_to=/tmp",
        ),
        (
            {"backend": None, "backend_error": "RuntimeError: no", "environment": {}},
            "JAX cannot start",
            "reinstall jax and jaxlib",
        ),
        (
            {"backend": "cpu"},
            "the system shows a GPU (NVIDIA H100), but JAX runs on the CPU",
            "run pip install 'cudagraph-jax[cuda12]'",
        ),
        (
            {"backend": "cpu", "versions": PLUGIN},
            "JAX runs on the CPU",
            "run JAX_PLATFORMS=cuda python",
        ),
        (
            {"backend": "cpu", "environment": {"JAX_PLATFORMS": "cpu"}},
            "JAX runs on the CPU",
            "unset JAX_PLATFORMS=cpu",
        ),
        (
            {"versions": {"jax": "0.9.2", "jaxlib": "0.9.2"}},
            "jax 0.9.2 is older than 0.10",
            "run pip install --upgrade 'jax>=0.10'",
        ),
        (
            {"versions": {"jax": "0.12.0", "jaxlib": "0.11.1"}},
            "jax 0.12.0 and jaxlib 0.11.1 are of different versions",
            "run pip install jax==0.12.0 jaxlib==0.12.0",
        ),
        (
            {"versions": {**PLUGIN, "jax-cuda12-pjrt": "0.11.0"}},
            "jax-cuda12-pjrt 0.11.0 and jaxlib 0.12.0 are of different versions",
            "run pip install jax-cuda12-pjrt==0.12.0",
        ),
        (
            {"versions": {**PLUGIN, "jax-cuda13-plugin": "0.12.0"}},
            "plugins for two versions of CUDA are installed",
            "uninstall those of one of them",
        ),
        (
            {"platform_version": "PJRT C API\ncuda 12020"},
            "CUDA 12.2 is older than 12.3",
            "update the driver",
        ),
        (
            {"environment": {"XLA_FLAGS": "--xla_gpu_enable_command_buffer= --x=1"}},
            "XLA_FLAGS keeps XLA from recording anything",
            "leave xla_gpu_enable_command_buffer out of XLA_FLAGS",
        ),
        (
            {"environment": {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=-FUSION"}},
            "XLA_FLAGS keeps XLA from recording fusions",
            "leave xla_gpu_enable_command_buffer out",
        ),
        (
            {"scopes": {"AUTO": None, "FULL": "INVALID_ARGUMENT: no such value"}},
            "refuses the options of CommandBufferScope.FULL (INVALID_ARGUMENT: no such value)",
            "use another scope",
        ),
        ({"settings": {"jax_enable_x64": True}}, "jax_enable_x64 is on", "JAX_ENABLE_X64"),
        ({"settings": {"jax_debug_nans": True}}, "jax_debug_nans is on", "JAX_DEBUG_NANS"),
        ({"settings": {"jax_debug_infs": True}}, "jax_debug_infs is on", "JAX_DEBUG_INFS"),
        ({"settings": {"jax_disable_jit": True}}, "jax_disable_jit is on", "JAX_DISABLE_JIT"),
        (
            {"compiles_reported": False},
            "this JAX does not report its compiles",
            "use a jax that is supported",
        ),
        ({"cpu_count": 1}, "one CPU core", "give it two or more"),
    ],
)
def test_findings(changes, what, remedy):
    """Each thing that is wrong is one finding, with what to do."""
    (finding,) = found(**changes)
    assert what in finding.what
    assert remedy in finding.remedy
    assert str(finding) == f"{finding.what}: {finding.remedy}"


def test_several():
    """What keeps JAX from starting comes first."""
    several = found(backend=None, backend_error="no", cpu_count=1)
    assert [finding.what[:16] for finding in several] == ["JAX cannot start", "this process may"]
    assert all(isinstance(finding, Finding) for finding in several)


@pytest.mark.parametrize(
    ("flags", "recorded"),
    [
        ("", None),
        ("--xla_gpu_autotune_level=0", None),
        ("--xla_gpu_enable_command_buffer=", set()),
        ("--xla_gpu_enable_command_buffer=''", set()),
        ("--xla_gpu_enable_command_buffer=fusion,CUBLAS", {"FUSION", "CUBLAS"}),
        (
            "--xla_gpu_enable_command_buffer=FUSION --xla_gpu_enable_command_buffer=CUDNN",
            {"CUDNN"},
        ),
    ],
)
def test_commands_of(flags, recorded):
    """Flags replace the list of commands; the last of them counts."""
    assert commands_of(flags) == recorded


def test_commands_added_and_removed():
    """A plus or a minus changes XLA's defaults."""
    recorded = commands_of("--a=1 --xla_gpu_enable_command_buffer=+WHILE,-FUSION --b=1")
    assert recorded is not None
    assert "WHILE" in recorded
    assert "CUBLAS" in recorded
    assert "FUSION" not in recorded


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("0.12.0.1", (0, 12, 0)), ("0.10", (0, 10)), ("0.10.0rc1", (0, 10, 0)), ("unknown", ())],
)
def test_release(version, numbers):
    """A version is compared by its first three numbers."""
    assert release(version) == numbers


def test_oldest_jax():
    """The oldest JAX is the one that the package asks for."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"jax>={'.'.join(map(str, MIN_JAX))}" in project["dependencies"]
