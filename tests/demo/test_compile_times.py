"""The note of what compiling took."""

import json

import pytest

from cudagraph_jax import GraphStore
from cudagraph_jax.demo.warmup_figures import NOTE, compile_times_ms, note_compile_times


@pytest.fixture
def store(tmp_path):
    return GraphStore(tmp_path)


def test_nothing_is_known_at_first(store):
    """An empty store knows of no bucket, and noting none writes nothing."""
    note_compile_times(store, {})
    assert compile_times_ms(store) == {}
    assert not (store.path / NOTE).exists()


def test_notes_add_up(store):
    """A bucket that is compiled again has its new time, the others keep theirs."""
    note_compile_times(store, {"1x16": 100.0, "2x16": 200.0})
    note_compile_times(store, {"2x16": 250.0})
    assert compile_times_ms(store) == {"1x16": 100.0, "2x16": 250.0}
    assert len(store) == 0
    assert store.prune(max_bytes=0).entries == ()
    assert compile_times_ms(store) == {"1x16": 100.0, "2x16": 250.0}


def test_another_setup(store):
    """What another JAX took is neither told nor lost."""
    (store.path / NOTE).write_text(json.dumps({"jax 0.1, abacus": {"1x16": 1.0}}))
    assert compile_times_ms(store) == {}
    note_compile_times(store, {"1x16": 100.0})
    assert compile_times_ms(store) == {"1x16": 100.0}
    assert "jax 0.1, abacus" in json.loads((store.path / NOTE).read_text())


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"jax": 3}'])
def test_damaged(store, content):
    """A damaged note is no note, and is replaced by the next one."""
    (store.path / NOTE).write_bytes(content)
    assert compile_times_ms(store) == {}
    note_compile_times(store, {"1x16": 100.0})
    assert compile_times_ms(store) == {"1x16": 100.0}


def test_cannot_be_written(store):
    """Where the note cannot be written the demo goes on without."""
    (store.path / NOTE).mkdir()
    note_compile_times(store, {"1x16": 100.0})
    assert compile_times_ms(store) == {}
