"""manager.report() and what notebooks show: snapshots of a manager that works."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import pytest

from cudagraph_jax import (
    CUDAGraphConfig,
    CUDAGraphError,
    CUDAGraphManager,
    CUDAGraphWarning,
    GraphStore,
    bucket_jit,
)
from tests.helpers.functions import GRID, double, floats
from tests.helpers.html_reader import Reader
from tests.helpers.processes import run_script


@pytest.fixture
def manager():
    """A manager that served three calls in two buckets, and one eagerly."""
    manager = CUDAGraphManager(GRID)
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    for batch, seq in [(2, 4), (2, 3), (1, 2), (9, 9)]:
        function(floats(0, batch, seq))
    yield manager
    del function  # which goes, and its graphs with it, no earlier


def test_report_is_a_snapshot(manager):
    """A report has the statistics, the configuration and the surroundings of its moment."""
    report = manager.report()
    stats = manager.stats()
    assert report.stats == stats
    assert report.config == GRID
    assert report.made_at.tzinfo is not None
    assert report.environment["jax"] == jax.__version__
    assert report.environment["backend"].startswith(jax.default_backend())
    bucket_jit(double, in_axes=("batch seq",), manager=manager)(floats(0, 1, 5))
    assert report.stats == stats
    assert repr(report).startswith("Report(double, 2 graphs, ")


@pytest.mark.parametrize("how", ["config", "store", "path"])
def test_report_has_the_store(tmp_path, how):
    """The store's path is in a report, however it was given."""
    ways: dict[str, dict[str, Any]] = {
        "config": {"config": dataclasses.replace(GRID, store=str(tmp_path))},
        "store": {"store": GraphStore(tmp_path)},
        "path": {"store": str(tmp_path)},
    }
    report = bucket_jit(double, in_axes=("batch seq",), **ways[how]).manager.report()
    for text in (str(report), report._repr_html_()):
        assert str(tmp_path) in text


def test_report_prints(manager):
    """Printed, a report has the totals and every bucket."""
    text = str(manager.report())
    assert text.startswith("double, ")
    assert "eager calls          1 (overflow 1)" in text
    assert "\n3x5 " in text
    assert "\n1x2 " in text


def test_report_writes_a_page(manager, tmp_path):
    """With a path the report is also a page of its own, in place of an older one."""
    path = tmp_path / "cache.html"
    path.write_text("old")
    report = manager.report(path)
    assert path.read_text(encoding="utf-8") == report.html()
    reader = Reader(report.html())
    assert reader.all("h1") == ["double"]
    assert {"3x5", "1x2"} <= set(reader.all("td"))
    assert manager.report(str(path)).html() == path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["cache.html"]


def test_report_into_a_missing_folder(manager, tmp_path):
    """A folder that does not exist is an error that says so, and nothing is written."""
    with pytest.raises(OSError, match="make the folder first") as raised:
        manager.report(tmp_path / "missing" / "cache.html")
    assert isinstance(raised.value, CUDAGraphError)
    assert list(tmp_path.iterdir()) == []


def test_empty_manager():
    """A manager that did nothing yet, or never will, has a report."""
    for config in (GRID, CUDAGraphConfig.disabled()):
        manager = CUDAGraphManager(config)
        assert "No bucket is captured yet." in str(manager.report())
        Reader(manager.report().html())
        assert "No bucket is captured yet." in manager._repr_html_()


def test_report_starts_no_backend():
    """A report before the first capture does not start JAX's backend for it."""
    script = """
import jax
from cudagraph_jax import CUDAGraphManager
report = CUDAGraphManager().report()
assert report.environment["backend"] == "not known before the first bucket"
jax.config.update("jax_num_cpu_devices", 3)  # refused once a backend runs
assert len(jax.devices("cpu")) == 3
"""
    assert run_script(script).returncode == 0


def test_report_of_what_was_loaded(tmp_path):
    """Where all buckets come from a store the report names the backend that they run on."""
    for count in ("captured", "loaded"):
        function = bucket_jit(double, in_axes="batch seq", config=GRID, store=tmp_path)
        assert getattr(function.warmup(floats(0, 2, 4), progress=False), count) == 6
        assert "cpu: 1" in function.report().environment["backend"]


def test_notebook(manager):
    """Manager, registry and function show figures and buckets in a notebook, by their names."""
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)
    for shown, name in [
        (manager, "CUDAGraphManager"),
        (manager.registry, "CUDAGraphRegistry"),
        (function, "double"),
    ]:
        reader = Reader(shown._repr_html_())
        assert reader.all("b") == [name]
        assert {"3x5", "1x2"} <= set(reader.all("td"))


def test_hostile_function_name(tmp_path):
    """A function may have any name; in a report it is text."""

    def hostile(x):
        return x * 2

    function = bucket_jit(
        hostile, in_axes=("batch seq",), config=GRID, name="<script>alert(1)</script>\n&"
    )
    function(floats(0, 1, 2))
    assert "<script>" not in function._repr_html_()
    assert "<script>" not in function.manager.report(tmp_path / "a.html").html()


def test_report_while_calls_run(manager, tmp_path):
    """Reports and calls in many threads do not disturb each other."""
    function = bucket_jit(double, in_axes=("batch seq",), manager=manager)

    def work(number):
        function(floats(0, number % 4 + 1, number % 5 + 1))
        manager.report(tmp_path / "cache.html")
        return manager._repr_html_()

    with ThreadPoolExecutor(8) as pool:
        for html in pool.map(work, range(40)):
            Reader(html)
    Reader((tmp_path / "cache.html").read_text(encoding="utf-8"))
    assert len(list(tmp_path.iterdir())) == 1


def test_report_names_what_failed(tmp_path):
    """A bucket that could not be captured is in the report with its function and its error."""

    def branching(x):
        return x if x.sum() > 0 else -x

    function = bucket_jit(branching, in_axes=("batch seq",), config=GRID)
    with pytest.warns(CUDAGraphWarning):
        function(floats(0, 1, 2))
    report = function.manager.report()
    ((bucket, name, error),) = report.failures
    assert bucket == "1x2"
    assert name.startswith("branching(")
    assert error in Reader(report.html()).all("td")
