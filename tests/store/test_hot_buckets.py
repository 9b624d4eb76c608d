"""The hot buckets in a store: written whole, added up, bounded, never trusted."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from cudagraph_jax import GraphStore, StoreError
from cudagraph_jax.store.locks import LOCK, held


def test_there_and_back(tmp_path):
    """Counts come back, and are added to those that are there."""
    store = GraphStore(tmp_path)
    assert store.hot() == {}
    store.remember_hot({"f": {"1x8": 3}, "g": {"2x8": 1}})
    store.remember_hot({"f": {"4x8": 2, "1x8": 1}})
    assert store.hot() == {"g": {"2x8": 1}, "f": {"1x8": 4, "4x8": 2}}
    assert GraphStore(tmp_path, mode="ro").hot() == store.hot()
    assert len(store) == 0


def test_servers_add_up(tmp_path):
    """What eight servers write at once into one file is all there."""
    pytest.importorskip("filelock")
    ready = threading.Barrier(8)
    stores = [GraphStore(tmp_path) for _ in range(8)]

    def serve(number, store):
        for _ in range(5):
            ready.wait(60)
            store.remember_hot({"f": {"2x8": 10}, f"of {number}": {"1x8": 1}})

    threads = [threading.Thread(target=serve, args=each) for each in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {f"of {number}": {"1x8": 5} for number in range(8)}
    assert stores[0].hot() == {"f": {"2x8": 400}, **expected}


def test_a_writer_that_hangs_is_not_waited_for(tmp_path):
    """Whoever does not get the lock soon writes without it."""
    pytest.importorskip("filelock")
    store = GraphStore(tmp_path)
    with held(tmp_path / f"hot.json{LOCK}", timeout_s=0) as had:
        assert had
        store.remember_hot({"f": {"1x8": 3}})
    assert store.hot() == {"f": {"1x8": 3}}


def test_a_restart_halves_what_was_written_before(tmp_path):
    """Old counts fade by half for all servers of a start together, those of others stay."""
    store = GraphStore(tmp_path)
    store.remember_hot({"f": {"2x8": 99, "4x8": 1}, "g": {"2x8": 7}})
    os.utime(tmp_path / "hot.json", (10.0**9, 10.0**9))
    together = [GraphStore(tmp_path) for _ in range(3)]
    for store in together:
        store.remember_hot({"f": {"1x8": 1}})
        store.remember_hot({"f": {"1x8": 1}})
    assert store.hot() == {"f": {"2x8": 49, "1x8": 6}, "g": {"2x8": 7}}


def test_counts_stay_bounded(tmp_path):
    """Of one function the hottest buckets stay, and all counts are halved before they get huge."""
    store = GraphStore(tmp_path)
    store.remember_hot({"f": {f"{number}x8": number for number in range(2000)}})
    assert set(store.hot()["f"]) == {f"{number}x8" for number in range(976, 2000)}
    store.remember_hot({"g": {"1x8": 2**40, "2x8": 2**30, "4x8": 1}})
    assert store.hot()["g"] == {"1x8": 2**19, "2x8": 2**9}
    for _ in range(8):
        store.remember_hot({"g": {"2x8": 2**19}})
    hot = store.hot()["g"]
    assert hot["2x8"] > hot["1x8"]
    assert sum(hot.values()) < 2**20


def test_what_is_written_can_be_read(tmp_path):
    """A file that would be too large to be read again is cut to the functions written last."""
    store = GraphStore(tmp_path)
    buckets = {f"{number}x1000000": 1000 for number in range(1024)}
    for first in range(0, 60, 10):
        store.remember_hot({f"f{number}": buckets for number in range(first, first + 10)})
    assert (tmp_path / "hot.json").stat().st_size <= 2**20
    names = list(store.hot())
    assert 20 < len(names) < 60
    assert names == [f"f{number}" for number in range(60 - len(names), 60)]


def test_it_does_not_grow_for_ever(tmp_path):
    """Of many functions those written last stay."""
    store = GraphStore(tmp_path)
    for first in range(0, 300, 30):
        numbers = range(first, first + 30)
        store.remember_hot({f"f{number}": {"1x8": number} for number in numbers})
    assert list(store.hot()) == [f"f{number}" for number in range(44, 300)]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"f": 3}', '{"f": {"2x4": "x"}}', '{"f": {"2x4": 1e999}}', "[" * 10**5],
)
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
    assert store.prune(max_bytes=2**40).leftovers == (draft.name,)
    assert store.hot() == {"f": {"1x8": 3}}
