"""Gathering what the doctor looks at."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import cudagraph_jax
from cudagraph_jax.cli.checkup import findings
from cudagraph_jax.cli.probe import EXTRAS, gather, machine_fields, refused
from cudagraph_jax.xla.environment import jaxlib_version


def program(*, returncode=0, stdout="", stderr=""):
    """A stand-in for subprocess.run, and the commands that it was asked to run."""
    asked = []

    def run(command, **settings):
        asked.append(command)
        return subprocess.CompletedProcess(command, returncode, stdout, stderr)

    return run, asked


@pytest.fixture(scope="module")
def snapshot():
    return gather(environ={})


def test_this_process(snapshot):
    """The snapshot is of the JAX that runs here."""
    assert snapshot.versions["jax"] == jax.__version__
    assert snapshot.versions["cudagraph-jax"] == cudagraph_jax.__version__
    assert snapshot.backend == jax.default_backend()
    assert sum(devices.count for devices in snapshot.devices) == jax.device_count()
    assert snapshot.cpu_count >= 1
    assert snapshot.compiles_reported
    assert snapshot.settings["jax_enable_x64"] is False
    assert snapshot.environment == {}


def test_machine_fields():
    """Where JAX cannot start, its versions are what a store is compared by."""
    assert machine_fields(backend_starts=True)["platform"] == jax.default_backend()
    versions = {"jax": jax.__version__, "jaxlib": jaxlib_version()}
    assert machine_fields(backend_starts=False) == versions


def test_options(snapshot):
    """Every scope is accepted, and each command is accepted or refused in XLA's words."""
    assert snapshot.scopes == dict.fromkeys(("AUTO", "NONE", "PIECEWISE", "FULL"))
    assert snapshot.commands["FUSION"] is None
    lowered = jax.jit(lambda x: x).lower(np.float32(0))
    words = refused(lowered, {"xla_gpu_enable_command_buffer": "NO_SUCH_COMMAND"})
    assert words is not None
    assert words.startswith("INVALID_ARGUMENT")
    assert "\n" not in words


def test_xla_ends_the_process():
    """XLA's last words are the reason where its flags end the process that starts it."""
    words = "F1123 22:59:11.1 20537 parse.cc:234] Unknown flag in XLA_FLAGS: --nope=1\nmore\n"
    run, asked = program(returncode=1, stderr=words)
    snapshot = gather(environ={"XLA_FLAGS": "--nope=1", "OTHER": "x"}, run=run)
    assert snapshot.backend is None
    assert snapshot.backend_error == "Unknown flag in XLA_FLAGS: --nope=1"
    assert snapshot.environment == {"XLA_FLAGS": "--nope=1"}
    assert snapshot.commands == {}
    assert "import jax" in asked[0][-1]
    assert findings(snapshot)[0].remedy == "try without XLA_FLAGS=--nope=1"


@pytest.mark.parametrize(("stderr", "expected"), [("", "exit status 3"), ("a\nb\n", "b")])
def test_last_words(stderr, expected):
    """Without a word of the flags the last line is the reason, or the exit status."""
    run, _ = program(returncode=3, stderr=stderr)
    assert gather(environ={"XLA_FLAGS": "-"}, run=run).backend_error == expected


def test_programs_that_cannot_run():
    """A program that is missing or never ends is no reason to stop."""

    def run(command, **settings):
        raise subprocess.TimeoutExpired(command, settings["timeout"])

    assert "timed out" in str(gather(environ={"XLA_FLAGS": "-"}, run=run).backend_error)


def test_gpus(tmp_path):
    """The kernel's driver shows GPUs where NVIDIA's tool does not."""
    (tmp_path / "0000:01:00.0").mkdir()
    run, _ = program(returncode=9)
    assert gather(environ={}, run=run, proc=tmp_path).gpus == ("NVIDIA 0000:01:00.0",)
    assert gather(environ={}, run=run, proc=tmp_path / "none").gpus == ()


def test_nvidia_smi(tmp_path):
    """NVIDIA's tool gives their names."""
    tool = tmp_path / "nvidia-smi"
    tool.touch(mode=0o755)
    run, asked = program(stdout="NVIDIA H100\nNVIDIA H100\n")
    snapshot = gather(environ={"PATH": str(tmp_path)}, run=run, proc=tmp_path / "none")
    assert snapshot.gpus == ("NVIDIA H100", "NVIDIA H100")
    assert asked[0][0] == "nvidia-smi"


def test_extras():
    """The extras are those of the project, but for CUDA's and the developers' own."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"cuda12", "cuda13", "test", "dev", "docs"}
    for name, modules in EXTRAS.items():
        packages = {re.split(r"[\[>]", requirement)[0] for requirement in extras[name]}
        assert {package.replace("-", "_") for package in packages - {"cudagraph-jax"}} == set(
            modules
        )


def test_packages_without_metadata(monkeypatch):
    """Where jaxlib's metadata is missing, its own version is told."""
    monkeypatch.setattr(sys, "path", [])
    snapshot = gather(environ={})
    assert snapshot.versions["jaxlib"] == jaxlib_version()
    assert not any("jaxlib" in finding.what for finding in findings(snapshot))
