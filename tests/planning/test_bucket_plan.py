"""A planned grid: how it reads, what it gives, its plot."""

import dataclasses
import json
import pickle
import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.errors import ConfigError, CUDAGraphError
from cudagraph_jax.planning.plan import BucketPlan, PlanPoint, PlanRow
from cudagraph_jax.planning.planner import plan_buckets
from cudagraph_jax.shapes.ladder import Bucket, Ladder

SIZES = {(1, 16): 500, (2, 30): 400, (2, 64): 80, (4, 100): 20}
PLAN = BucketPlan(
    batch_sizes=Ladder((2, 4)),
    seq_lens=Ladder((16, 100)),
    expected_waste=0.125,
    requests=12345,
    curve=(PlanPoint(1, 0.5), PlanPoint(2, 0.25), PlanPoint(3, 0.25), PlanPoint(4, 0.125)),
    comparison=(PlanRow("powers of two", 1200, 0.3), PlanRow("vLLM", 7, 0.2)),
)


def test_repr():
    """One line with the number of buckets, the grid and what it wastes."""
    assert repr(PLAN) == "BucketPlan(4 buckets: 2x2, expected waste 12.5%)"


def test_text():
    """The ladders, the other grids on the same sizes, and what one more bucket is worth."""
    assert str(PLAN) == (
        "BucketPlan(4 buckets: 2x2, expected waste 12.5%) from 12,345 requests\n"
        "\n"
        "batch_sizes  2, 4\n"
        "seq_lens     16, 100\n"
        "\n"
        "grid           buckets  waste\n"
        "this plan            4  12.5%\n"
        "powers of two    1,200  30.0%\n"
        "vLLM                 7  20.0%\n"
        "\n"
        "buckets  least waste\n"
        "      1        50.0%\n"
        "      2        25.0%\n"
        "      3        25.0%\n"
        "      4        12.5%"
    )


def test_long_curve_is_thinned():
    """Of a long curve the text has the points at doubling numbers, and the last two."""
    curve = tuple(PlanPoint(graphs, 1 / graphs) for graphs in range(1, 12))
    text = str(dataclasses.replace(PLAN, curve=curve))
    shown = re.findall(r"^ +(\d+) ", text.split("least waste")[1], re.MULTILINE)
    assert shown == ["1", "2", "4", "8", "10", "11"]


class Cells(HTMLParser):
    """The open elements and the text of table cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.captions, self.titles = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        known = {"td": self.cells, "caption": self.captions, "b": self.titles}
        known.get(self.open[-1], []).append(data)


def test_html():
    """Three tables in one element, well formed, with the same figures as the text."""
    found = Cells(PLAN._repr_html_())
    assert found.open == []
    assert found.titles == ["BucketPlan(4 buckets: 2x2, expected waste 12.5%) from 12,345 requests"]
    assert found.captions == ["Ladders", "On the same sizes", "Waste by buckets"]
    assert found.cells[:4] == ["batch_sizes", "2, 4", "seq_lens", "16, 100"]
    assert found.cells[4:7] == ["this plan", "4", "12.5%"]
    assert PLAN._repr_html_().count("<style>") == 1


def test_html_is_escaped():
    """A name is text, also where it looks like HTML."""
    row = PlanRow("<script>alert('&')</script>", 1, 0.1)
    html = dataclasses.replace(PLAN, comparison=(row,))._repr_html_()
    assert "<script>" not in html
    assert row.name in Cells(html).cells


def test_json():
    """All fields go through JSON and come back equal."""
    d = PLAN.to_dict()
    assert json.loads(json.dumps(d)) == d
    assert d == {
        "batch_sizes": [2, 4],
        "seq_lens": [16, 100],
        "expected_waste": 0.125,
        "requests": 12345,
        "curve": [
            {"graphs": 1, "waste": 0.5},
            {"graphs": 2, "waste": 0.25},
            {"graphs": 3, "waste": 0.25},
            {"graphs": 4, "waste": 0.125},
        ],
        "comparison": [
            {"name": "powers of two", "graphs": 1200, "waste": 0.3},
            {"name": "vLLM", "graphs": 7, "waste": 0.2},
        ],
    }
    planned = plan_buckets(SIZES, max_graphs=4).to_dict()
    assert json.loads(json.dumps(planned)) == planned


def test_buckets():
    """The grid is every batch size with every length, ascending."""
    assert PLAN.num_graphs == 4
    assert PLAN.buckets() == (Bucket(2, 16), Bucket(2, 100), Bucket(4, 16), Bucket(4, 100))


def test_value():
    """A plan is a value: equal by its fields, hashable, pickled whole, never changed."""
    plan = plan_buckets(SIZES, max_graphs=4)
    assert plan == plan_buckets(SIZES, max_graphs=4) != plan_buckets(SIZES, max_graphs=3)
    assert len({plan, plan_buckets(SIZES, max_graphs=4)}) == 1
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(plan, protocol)) == plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.requests = 1  # type: ignore[misc]


@pytest.mark.parametrize("max_graphs", [1, 4, 6])
def test_config(max_graphs):
    """The configuration of a plan has its grid, and goes through JSON."""
    plan = plan_buckets(SIZES, max_graphs=max_graphs, headroom=(8, 128), seq_multiple=16)
    config = CUDAGraphConfig.from_plan(plan)
    assert config.buckets() == plan.buckets()
    assert (config.max_batch_size, config.max_seq_len) == (8, 128)
    assert CUDAGraphConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_evaluate():
    """On other requests the plan's own ladders count, and what is too large is told apart."""
    found = PLAN.evaluate([(2, 16), (3, 50), (5, 1), (1, 101)])
    assert (found.graphs, found.requests, found.overflows) == (4, 4, 2)
    assert found.waste == 1 - (32 + 150) / (32 + 400)
    by_call = PLAN.evaluate([(2, 16), (3, 50)], cost=lambda batch, seq: 1.0)
    assert by_call.waste == 0.0
    with pytest.raises(ConfigError, match=r"sizes are empty"):
        PLAN.evaluate([])


@pytest.fixture
def pyplot():
    """matplotlib without a screen, its figures closed afterwards."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


@pytest.mark.parametrize("plan", [PLAN, plan_buckets([5], max_graphs=1)], ids=["grid", "single"])
def test_plot(pyplot, plan, tmp_path):
    """The plot has the curve, this plan and the other grids, in percent, on its own figure."""
    ax = plan.plot()
    curve, here, *others = ax.get_lines()
    assert curve.get_xdata().tolist() == [point.graphs for point in plan.curve]
    assert curve.get_ydata().tolist() == [100 * point.waste for point in plan.curve]
    assert (here.get_xdata()[0], here.get_ydata()[0]) == (
        plan.num_graphs,
        100 * plan.expected_waste,
    )
    assert len(others) == len(plan.comparison)
    assert ax.get_xlabel() == "buckets"
    ax.figure.savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_plot_into_axes(pyplot):
    """Given axes, the plot goes there and nowhere else."""
    _, ax = pyplot.subplots()
    assert PLAN.plot(ax) is ax
    assert len(pyplot.get_fignums()) == 1


def test_plot_without_matplotlib(monkeypatch):
    """Without matplotlib the error says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CUDAGraphError) as caught:
        PLAN.plot()
    assert str(caught.value) == "a plot needs matplotlib: pip install 'cudagraph-jax[plot]'"


def test_a_file_name_is_no_place_to_draw():
    """A path in place of axes is refused, with what saves the figure."""
    path: Any = "plan.png"
    with pytest.raises(ConfigError, match=r"ax='plan.png' is no matplotlib Axes: .*savefig"):
        PLAN.plot(path)
