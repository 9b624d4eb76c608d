"""The doctor's look at a store."""

from __future__ import annotations

import pytest

from cudagraph_jax import GraphStore
from cudagraph_jax.cli.doctor_command import look_at

VERSIONS = {"jax": "0.12.0", "jaxlib": "0.12.0"}


@pytest.fixture
def store(tmp_path):
    """A store with two executables of these versions."""
    store = GraphStore(tmp_path)
    for bucket in ("1x8", "2x8"):
        store.put({"name": "f", "bucket": bucket, **VERSIONS}, b"bytes")
    return store


def test_a_sound_store(store):
    """What is in it is summed up, and nothing looks wrong."""
    look = look_at(store.path, versions=VERSIONS)
    assert look == (f"{store.path}: 2 executables, 0.0 MiB", ())


def test_none_was_given():
    """Without a directory it says how to give one."""
    assert look_at(None, versions=VERSIONS) == ("none looked at: --store DIR", ())


def test_a_bad_file(store):
    """A file that is not whole looks wrong; it is left where it is."""
    file = store.path / store.ls()[0].file
    file.write_bytes(file.read_bytes()[:-1])
    (finding,) = look_at(store.path, versions=VERSIONS).found
    assert finding.what == "1 of 2 files in the store are not whole, and compiled again"
    assert file.exists()


def test_other_versions(store):
    """A store in which nothing is of this jax is of no use here; one executable makes it so."""
    newer = {"jax": "0.13.0", "jaxlib": "0.13.0"}
    (finding,) = look_at(store.path, versions=newer).found
    assert "all 2 executables in the store are of other versions" in finding.what
    store.put({"name": "f", "bucket": "1x8", **newer}, b"bytes")
    assert look_at(store.path, versions=newer).found == ()


def test_a_directory_that_cannot_be_used(tmp_path):
    """One that is not there, or that others can write, looks wrong, with what to do."""
    (finding,) = look_at(tmp_path / "absent", versions=VERSIONS).found
    assert "there is no directory" in finding.what
    assert not (tmp_path / "absent").exists()
    tmp_path.chmod(0o777)
    look = look_at(tmp_path, versions=VERSIONS)
    assert look.summary == f"{tmp_path}: cannot be used"
    assert "chmod" in str(look.found[0])
