"""Who may change a store."""

import os
import stat
from pathlib import Path

import pytest

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.store.folder import checked_key, danger

ME, OTHER, ROOT = 1000, 1001, 0
PATH = Path("/srv/my graphs")


def found(mode, uid):
    return danger(os.stat_result((mode, 0, 0, 1, uid, 0, 0, 0, 0, 0)), PATH, uid=ME)


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o600, 0o444])
@pytest.mark.parametrize("uid", [ME, ROOT])
def test_safe(mode, uid):
    """One's own files and the superuser's are safe, whoever may read them."""
    assert found(stat.S_IFDIR | mode, uid) is None


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_others_can_write(mode):
    """A group or others that may write are an error with the command that ends it."""
    assert found(stat.S_IFDIR | mode, ME) == (
        f"/srv/my graphs can be written by others, mode={mode:04o}, who could plant code that "
        "this process runs: run chmod go-w '/srv/my graphs', or give the store a key"
    )


@pytest.mark.parametrize("uid", [ME, ROOT])
def test_a_directory_for_everybody(uid):
    """Of a directory such as /tmp the mode is not touched: one's own directory in it is safe."""
    assert found(stat.S_IFDIR | 0o1777, uid) == (
        "/srv/my graphs can be written by others, mode=1777, who could plant code that this "
        "process runs: give a directory of your own in it, such as '/srv/my graphs/graphs', or "
        "give the store a key"
    )


def test_another_owner():
    """Another owner is an error with the command that ends it, also for the superuser."""
    assert found(stat.S_IFDIR | 0o700, OTHER) == (
        "/srv/my graphs belongs to uid=1001, who could plant code that this process (uid=1000) "
        "runs: run chown 1000 '/srv/my graphs', or give the store a key"
    )
    as_root = os.stat_result((stat.S_IFREG | 0o600, 0, 0, 1, OTHER, 0, 0, 0, 0, 0))
    assert danger(as_root, PATH, uid=ROOT) is not None


@pytest.mark.parametrize("key", [None, b"x" * 16, b"x" * 1000])
def test_keys(key):
    """A key is bytes enough, or there is none."""
    assert checked_key(key) == key


@pytest.mark.parametrize("key", ["text of some length", b"short", 3, b""])
def test_no_keys(key):
    """Anything else is an error that does not show it."""
    with pytest.raises(ConfigError, match="is no key: give at least 16 random bytes") as raised:
        checked_key(key)
    assert not isinstance(key, str) or key not in str(raised.value)
