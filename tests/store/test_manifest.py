"""The hot buckets in a store: written whole, merged by function, bounded, never trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cudagraph_jax import GraphStore, StoreError


def test_there_and_back(tmp_path):
    """Counts come back; those of other functions stay, those of the same are replaced."""
    store = GraphStore(tmp_path)
    assert store.hot() == {}
    store.remember_hot({"f": {"1x8": 3}, "g": {"2x8": 1}})
    store.remember_hot({"f": {"4x8": 2}})
    assert store.hot() == {"g": {"2x8": 1}, "f": {"4x8": 2}}
    assert GraphStore(tmp_path, mode="ro").hot() == store.hot()
    assert len(store) == 0


def test_it_does_not_grow_for_ever(tmp_path):
    """Of many functions those written last stay."""
    store = GraphStore(tmp_path)
    for number in range(300):
        store.remember_hot({f"f{number}": {"1x8": number}})
    assert list(store.hot()) == [f"f{number}" for number in range(44, 300)]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"f": 3}', '{"f": {"2x4": "x"}}', "[" * 10**5])
def test_what_it_should_not_be(tmp_path, text, caplog):
    """Anything else is no counts, is said, and is replaced."""
    store = GraphStore(tmp_path)
    (tmp_path / "hot.json").write_text(text)
    assert store.hot() == {}
    assert "hot.json is not used" in caplog.text
    store.remember_hot({"f": {"1x8": 3}})
    assert store.hot() == {"f": {"1x8": 3}}


def test_a_huge_file_is_not_read(tmp_path):
    """A file of gigabytes takes no memory."""
    with Path(tmp_path / "hot.json").open("wb") as file:
        os.truncate(file.fileno(), 2**33)
    assert GraphStore(tmp_path).hot() == {}


def test_a_link_is_not_followed(tmp_path):
    """A link in its place is neither read nor written through."""
    target = tmp_path / "elsewhere"
    target.write_text('{"f": {"1x8": 1}}')
    store = GraphStore(tmp_path / "store")
    (store.path / "hot.json").symlink_to(target)
    assert store.hot() == {}
    store.remember_hot({"g": {"1x8": 3}})
    assert target.read_text() == '{"f": {"1x8": 1}}'
    assert store.hot() == {"g": {"1x8": 3}}


def test_read_only(tmp_path):
    """A store that is only read refuses to write."""
    with pytest.raises(StoreError, match="only read"):
        GraphStore(tmp_path, mode="ro").remember_hot({})


def test_a_directory_that_is_gone(tmp_path):
    """Without a directory there are no counts, and writing them is an error."""
    store = GraphStore(tmp_path / "store")
    store.path.rmdir()
    assert store.hot() == {}
    with pytest.raises(StoreError, match="there is no directory"):
        store.remember_hot({})


def test_leftover_drafts_are_pruned(tmp_path):
    """The draft of a killed writer goes when the store is pruned."""
    now = [10.0**9]
    store = GraphStore(tmp_path, clock=lambda: now[0])
    store.remember_hot({"f": {"1x8": 3}})
    draft = tmp_path / ".hot.json.00ff.tmp"
    draft.touch()
    os.utime(draft, (10.0**9, 10.0**9))
    now[0] += 7200
    assert store.prune().leftovers == (draft.name,)
    assert store.hot() == {"f": {"1x8": 3}}
