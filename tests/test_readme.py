"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import cudagraph_jax

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
QUICKSTART, *FURTHER = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_quickstart(capsys):
    """The quickstart prints what its comments say, and compiles nothing after warm-up."""
    exec(QUICKSTART, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "(3, 384)"
    assert printed[1].startswith("embed at 3x57: REPLAY in the bucket 4x64")


@pytest.mark.slow  # all that the README does
def test_further_code(tmp_path, monkeypatch):
    """What follows the quickstart runs after it, in order."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(QUICKSTART, names)
    for code in FURTHER:
        exec(code, names)
    names["embed"].manager.wait()
    assert names["embed"].manager.config.buckets() == names["plan"].buckets()
    assert (tmp_path / "cache.html").read_text(encoding="utf-8").lower().startswith("<!doctype")


def test_quickstart_stands_debug_mode():
    """The quickstart's function, whose mask is an ordinary input, is not accused of a leak."""
    names: dict[str, Any] = {}
    exec(QUICKSTART, names)
    config = cudagraph_jax.CUDAGraphConfig(
        capture_sizes=(4,), capture_seq_lens=(64,), debug_mode=True
    )
    checked = cudagraph_jax.bucket_jit(
        names["embed"].__wrapped__, in_axes=(None, "batch seq", "batch seq"), config=config
    )
    arguments = (names["params"], names["ids"], names["mask"])
    assert not checked.warmup(*arguments, progress=False).failed
    assert checked(*arguments).shape == (3, 384)


def test_every_error_of_the_table_exists():
    """Errors that the README names are the package's."""
    for name in set(re.findall(r"`(\w+(?:Error|Warning))`", README)):
        assert hasattr(cudagraph_jax, name), name
