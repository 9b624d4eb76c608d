"""Statistics and reports of a manager whose functions have axes by name."""

import json

import pytest

from cudagraph_jax import CUDAGraphConfig, bucket_jit
from cudagraph_jax.report.summary import stats_text
from tests.helpers.functions import floats

CONFIG = CUDAGraphConfig(
    capture_sizes=(2,),
    capture_axes={"height": (4, 8), "width": (4, 8)},
    warmup_iterations=0,
    on_miss="eager",
)


@pytest.fixture
def images():
    function = bucket_jit(lambda x: x * 2, in_axes="batch height width", config=CONFIG)
    function.warmup(floats(0, 2, 4, 4), progress=False)
    return function


def test_statistics_say_the_sizes(images):
    """Each graph has its named sizes, in values that JSON can hold."""
    images(floats(0, 1, 3, 7))
    stats = json.loads(json.dumps(images.stats()))
    graph = stats["registry"]["graphs"]["2x1,height=4,width=8"]
    assert graph["axes"] == {"height": 4, "width": 8}
    assert graph["replay_count"] == 1
    text = stats_text("images", stats)
    assert "height \\ width" in text
    assert text == stats_text("images", images.stats())


def test_reports_have_maps_of_the_axes(images):
    """A report has a heat map of height and width, and the sizes that were asked for."""
    images(floats(0, 1, 3, 7))
    report = images.manager.report()
    assert "by height and width" in report.html()
    assert "height  width" in str(report)


def test_the_nearest_bucket_is_told_by_its_axis():
    """An explanation says along which named axis the nearest captured bucket differs."""
    other = CUDAGraphConfig.from_dict({**CONFIG.to_dict(), "on_miss": "capture"})
    images = bucket_jit(lambda x: x * 2, in_axes="batch height width", config=other)
    images(floats(0, 2, 8, 8))
    images.seal()
    explanation = str(images.explain(floats(0, 2, 8, 9)))
    assert "larger than the limits, batch 2, height 8 and width 8," in explanation
    assert "the nearest captured bucket is 2x1,height=8,width=8, with width 8, not 9" in explanation


@pytest.mark.parametrize(
    ("in_axes", "shape", "limits"),
    [("batch", (9,), "batch 2"), ("seq", (9,), "seq_len 8"), ("height width", (9, 3), "height 8")],
)
def test_limits_are_those_of_the_function(in_axes, shape, limits):
    """An explanation has no limits of axes that the function does not carry."""
    limited = {"capture_seq_lens": (8,), "max_capture_seq_len": None}
    config = CUDAGraphConfig.from_dict({**CONFIG.to_dict(), **limited})
    function = bucket_jit(lambda x: x * 2, in_axes=in_axes, config=config)
    rest = " and width 8" if "width" in in_axes else ""
    assert f"the limits, {limits}{rest}, and on_" in str(function.explain(floats(0, *shape)))
