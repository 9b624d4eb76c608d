"""What buckets did, added up by their two sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.report.heatmap import LEVELS, ON_A_PAGE, HeatGrid
from cudagraph_jax.shapes.ladder import Bucket
from tests.helpers.snapshots import STATS, graph, manager_stats


def grid(*graphs, most=ON_A_PAGE):
    return HeatGrid.of(manager_stats(*graphs), most=most)


def test_variants_of_a_bucket_are_added_up():
    """Replays of one bucket add up whatever the function, and its waste is theirs together."""
    several = grid(graph(8, 64, 30, 0.5), graph(8, 64, 10, 0.1), graph(8, 64), graph(4, 64))
    assert several.replays == {Bucket(8, 64): 40, Bucket(4, 64): 0}
    assert several.waste(Bucket(8, 64)) == pytest.approx(0.4)
    assert several.waste(Bucket(4, 64)) is None


def test_maps():
    """Each bucket has its replays in one map and its waste in the other; none is a dash."""
    some = grid(graph(1, 16, 1, 0.04), graph(1, 32, 20_000, 0.6), graph(2, 16))
    hits, waste = some.hits_map(), some.waste_map()
    assert (hits.batch_sizes, hits.seq_lens) == ([1, 2], [16, 32])
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
    shown = many.hits_map()
    assert (shown.batch_sizes, shown.seq_lens) == ([2, 4], [16, 32])
    assert set(shown.cells) == {Bucket(2, 16), Bucket(4, 32)}
    assert shown.note == (
        "Shown are the most used sizes: 2 of 4 batch sizes, 2 of 3 sequence lengths. "
        "Left out: 2 buckets with 6 replays."
    )


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_shades_grow_with_the_number(counts):
    """More hits never have a weaker shade; the most have the strongest, none has none."""
    cells = grid(*[graph(1, seq, count) for seq, count in enumerate(counts, 1)]).hits_map().cells
    levels = [cells[1, seq].level for seq, _ in enumerate(counts, 1)]
    ordered = [level for _, level in sorted(zip(counts, levels, strict=True))]
    assert ordered == sorted(ordered)
    for count, level in zip(counts, levels, strict=True):
        assert (level == 0) == (count == 0)
        if count and count == max(counts):
            assert level == LEVELS - 1


@given(STATS.filter(lambda stats: stats["registry"]["graphs"]), st.integers(1, 30))
def test_any_snapshot(stats, most):
    """Any statistics give maps within their limits, of which every cell has a shade."""
    found = HeatGrid.of(stats, most=(most, most))
    for shown in (found.hits_map(), found.waste_map()):
        assert max(len(shown.batch_sizes), len(shown.seq_lens)) <= most
        assert all(0 <= cell.level < LEVELS for cell in shown.cells.values())
        assert bool(shown.note) == (len(shown.cells) < len(found.replays))
