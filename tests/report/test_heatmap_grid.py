"""What buckets did, added up by their sizes along two axes."""

from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.report.heatmap import LEVELS, ON_A_PAGE, HeatGrid
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.examples import examples
from tests.helpers.snapshots import STATS, graph, manager_stats


def grid(*graphs, most=ON_A_PAGE):
    return HeatGrid.of(manager_stats(*graphs), most=most)


def test_variants_of_a_bucket_are_added_up():
    """Replays of one bucket add up whatever the function, and its waste is theirs together."""
    several = grid(graph(8, 64, 30, 0.5), graph(8, 64, 10, 0.1), graph(8, 64), graph(4, 64))
    assert several.replays == {Bucket(8, 64): 40, Bucket(4, 64): 0}
    _, waste = several.maps()
    assert waste.cells[8, 64].words == "8x64: 40.0% padding in 40 replays"
    assert waste.cells[4, 64].words == "4x64: never replayed"


def test_maps():
    """Each bucket has its replays in one map and its waste in the other; none is a dash."""
    some = grid(graph(1, 16, 1, 0.04), graph(1, 32, 20_000, 0.6), graph(2, 16))
    hits, waste = some.maps()
    assert (hits.rows, hits.columns) == ([1, 2], [16, 32])
    assert {bucket: cell.text for bucket, cell in hits.cells.items()} == {
        Bucket(1, 16): "1",
        Bucket(1, 32): "20.0k",
        Bucket(2, 16): "0",
    }
    assert hits.cells[1, 32].words == "1x32: 20,000 replays"
    assert [waste.cells[bucket].text for bucket in hits.cells] == ["4%", "60%", "–"]
    assert waste.cells[1, 32].words == "1x32: 60.0% padding in 20,000 replays"
    assert waste.cells[2, 16].words == "2x16: never replayed"
    assert [hits.cells[bucket].level for bucket in hits.cells] == [1, 4, 0]
    assert [waste.cells[bucket].level for bucket in hits.cells] == [0, 4, 0]
    assert hits.note == waste.note == ""


def test_the_most_used_sizes_are_shown():
    """Of more sizes than there is room for, the most used stay, in order; the note counts."""
    many = grid(graph(1, 16, 5), graph(2, 16, 9), graph(4, 32, 7), graph(8, 64, 1), most=(2, 2))
    shown, _ = many.maps()
    assert (shown.rows, shown.columns) == ([2, 4], [16, 32])
    assert set(shown.cells) == {Bucket(2, 16), Bucket(4, 32)}
    assert shown.note == (
        "Shown are the most used sizes: 2 of 4 batch sizes, 2 of 3 sequence lengths. "
        "Left out: 2 buckets with 6 replays."
    )


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_shades_grow_with_the_number(counts):
    """More hits never have a weaker shade; the most have the strongest, none has none."""
    cells = grid(*[graph(1, seq, count) for seq, count in enumerate(counts, 1)]).maps()[0].cells
    levels = [cells[1, seq].level for seq, _ in enumerate(counts, 1)]
    ordered = [level for _, level in sorted(zip(counts, levels, strict=True))]
    assert ordered == sorted(ordered)
    for count, level in zip(counts, levels, strict=True):
        assert (level == 0) == (count == 0)
        if count and count == max(counts):
            assert level == LEVELS - 1


@examples(40, thorough=100)
@given(STATS.filter(lambda stats: stats["registry"]["graphs"]), st.integers(1, 30))
def test_any_snapshot(stats, most):
    """Any statistics give maps within their limits, of which every cell has a shade."""
    found = HeatGrid.of(stats, most=(most, most))
    for shown in found.maps():
        assert max(len(shown.rows), len(shown.columns)) <= most
        assert all(0 <= cell.level < LEVELS for cell in shown.cells.values())
        sizes = [bucket.sizes for bucket in found.replays if bucket.sizes.keys() >= {*shown.axes}]
        places = {tuple(each[axis] for axis in shown.axes) for each in sizes}
        assert bool(shown.note) == (shown.cells.keys() < places)
        assert shown.cells.keys() <= places


def image(height, width, replays, waste=0.0, batch=8):
    return graph(batch, 1, replays, waste, axes={"height": height, "width": width})


def test_a_map_for_each_pair_of_axes():
    """Axes of more than one size have maps in pairs, with the other sizes together."""
    some = grid(image(4, 8, 3, 0.5), image(4, 16, 5), image(8, 8, 2, 0.25), image(4, 8, 1, batch=2))
    assert [shown.axes for shown in some.maps()[::2]] == [
        ("batch", "height"),
        ("batch", "width"),
        ("height", "width"),
    ]
    hits, waste = some.maps()[2:4]
    assert hits.title == "Hits: how often each bucket was replayed, by batch and width"
    assert {place: cell.words for place, cell in hits.cells.items()} == {
        (8, 8): "batch 8, width 8: 5 replays",
        (8, 16): "batch 8, width 16: 5 replays",
        (2, 8): "batch 2, width 8: 1 replay",
    }
    # Of 3 x 256 and 2 x 512 elements a half and a quarter were padding.
    assert waste.cells[8, 8].words == "batch 8, width 8: 35.7% padding in 5 replays"
    assert "batch \\ width" in hits.text()


def test_axes_of_one_size_have_no_map():
    """Where only one axis has more than one size it stands beside the batch."""
    several = grid(image(4, 8, 3), image(8, 8, 2))
    assert {shown.axes for shown in several.maps()} == {("batch", "height")}
    assert {shown.axes for shown in grid(image(4, 8, 3)).maps()} == {("batch", "seq")}


def test_functions_of_different_axes():
    """Axes that no bucket has together are no pair; buckets without an axis are in other maps."""
    texts = graph(8, 64, 3), graph(8, 128, 1)
    images = graph(8, 1, 2, axes={"height": 4}), graph(8, 1, 2, axes={"height": 8})
    apart = grid(*texts, *images, graph(8, 1, axes={"src": 3}), graph(8, 1, axes={"src": 5}))
    assert [shown.axes for shown in apart.maps()[::2]] == [("seq", "height"), ("seq", "src")]
    assert apart.maps()[0].cells.keys() == {(1, 4), (1, 8)}
    heights = graph(8, 1, 2, axes={"height": 4}), graph(8, 1, 2, axes={"height": 8})
    alone = grid(*heights, graph(8, 1, axes={"src": 3}), graph(8, 1, axes={"src": 5}))
    assert [shown.axes for shown in alone.maps()[::2]] == [("batch", "height"), ("batch", "src")]


def test_what_is_left_out_of_named_axes():
    """The note counts buckets, also such as share a place."""
    many = grid(image(4, 8, 3), image(8, 8, 2), image(4, 16, 1), image(8, 16, 1), most=(1, 2))
    assert many.maps()[0].note == (
        "Shown are the most used sizes: 1 of 2 sizes of height, 2 of 2 sizes of width. "
        "Left out: 2 buckets with 3 replays."
    )
