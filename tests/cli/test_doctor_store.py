"""The doctor's look at a store."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from cudagraph_jax import GraphStore
from cudagraph_jax.cli.doctor_command import look_at
from cudagraph_jax.cli.probe import machine_fields
from tests.helpers.warm_servers import warmed

VERSIONS = {"jax": "0.12.0", "jaxlib": "0.12.0"}


@pytest.fixture
def key():
    return None


@pytest.fixture
def store(tmp_path, key):
    """A store with two executables of these versions."""
    store = GraphStore(tmp_path, key=key)
    for bucket in ("1x8", "2x8"):
        store.put({"name": "f", "bucket": bucket, **VERSIONS}, b"bytes")
    return store


@pytest.mark.parametrize("key", [None, b"k" * 32])
def test_a_sound_store(store):
    """What is in it is summed up, also without its key, and nothing looks wrong."""
    size = sum(record.size_bytes for record in store.ls())
    look = look_at(store.path, machine=VERSIONS)
    assert look == (f"{store.path}: 2 executables, {size} B, 2 for this machine", ())


def test_none_was_given():
    """Without a directory it says how to give one."""
    assert look_at(None, machine=VERSIONS) == ("none looked at: --store DIR", ())


def test_a_bad_file(store):
    """A file that is not whole looks wrong; it is left where it is."""
    file = store.path / store.ls()[0].file
    file.write_bytes(file.read_bytes()[:-1])
    (finding,) = look_at(store.path, machine=VERSIONS).found
    assert finding.what == "1 of 2 files in the store are not whole, and compiled again"
    assert file.exists()


def test_another_machine(store):
    """A store of which nothing is loaded here looks wrong, and why; one executable helps."""
    newer = {"jax": "0.12.0", "jaxlib": "0.13.0"}
    look = look_at(store.path, machine=newer)
    assert look.summary.endswith(" B, 0 for this machine")
    (finding,) = look.found
    assert finding.what == (
        "none of the 2 executables in the store is loaded here; the nearest has "
        'jaxlib "0.12.0", not "0.13.0"'
    )
    store.put({"name": "f", "bucket": "1x8", **newer}, b"bytes")
    assert look_at(store.path, machine=newer).found == ()


def test_this_machine(tmp_path):
    """What was captured here is for this machine, and not for others."""
    warmed(jnp.sin, tmp_path)
    machine = machine_fields(backend_starts=True)
    assert look_at(tmp_path, machine=machine).summary.endswith(" KiB, 1 for this machine")
    other = {**machine, "device_kind": ["other"]}
    (finding,) = look_at(tmp_path, machine=other).found
    assert 'not ["other"]' in finding.what


def test_a_directory_that_cannot_be_used(tmp_path):
    """One that is not there, or that others can write, looks wrong, with what to do."""
    (finding,) = look_at(tmp_path / "absent", machine=VERSIONS).found
    assert "there is no directory" in finding.what
    assert not (tmp_path / "absent").exists()
    tmp_path.chmod(0o777)
    look = look_at(tmp_path, machine=VERSIONS)
    assert look.summary == f"{tmp_path}: cannot be used"
    assert "chmod" in str(look.found[0])
