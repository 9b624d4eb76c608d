"""Axis specifications."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.errors import ConfigError, InputShapeError
from cudagraph_jax.shapes.axes import (
    PASS_THROUGH,
    AxisPattern,
    Leaf,
    LeafAxes,
    Length,
    axes_by_size,
    sizes_of,
)
from cudagraph_jax.shapes.ladder import Bucket


@st.composite
def dimensions(draw):
    """The names of an array's dimensions, in order: batch, seq or `_`."""
    carried = draw(st.lists(st.sampled_from(["batch", "seq"]), unique=True))
    return draw(st.permutations([*carried, *["_"] * draw(st.integers(0, 4))]))


def _index(names, name):
    return names.index(name) if name in names else None


@given(dimensions(), st.data())
def test_resolve_is_the_written_order(names, data):
    """The axes are where the names stand, also where `...` stands for any number of the others."""
    axes = LeafAxes.at(_index(names, "batch"), _index(names, "seq"))
    text = " ".join(names)
    assert AxisPattern.parse(text).resolve(len(names), name="x") == axes

    start = data.draw(st.integers(0, len(names)))
    stop = start
    while stop < len(names) and names[stop] == "_" and data.draw(st.booleans()):
        stop += 1
    short = AxisPattern.parse("  ".join([*names[:start], "...", *names[stop:]]))
    assert short.min_ndim == start + len(names) - stop
    assert short.resolve(len(names), name="x") == axes


@pytest.mark.parametrize(
    ("text", "ndim", "axes"),
    [
        ("", 0, (None, None)),
        ("batch", 1, (0, None)),
        ("batch seq ...", 2, (0, 1)),
        ("batch seq ...", 5, (0, 1)),
        ("_ seq batch", 3, (2, 1)),
        ("batch ... seq", 2, (0, 1)),
        ("batch ... seq", 5, (0, 4)),
        ("... seq batch _", 5, (3, 2)),
        ("seq _ ... _ batch", 6, (5, 0)),
        ("...", 0, (None, None)),
        ("...", 3, (None, None)),
        ("_ _", 2, (None, None)),
    ],
)
def test_resolve(text, ndim, axes):
    """The axes of these patterns."""
    pattern = AxisPattern.parse(text)
    assert pattern.text == text
    assert pattern.resolve(ndim, name="x") == LeafAxes.at(*axes)


FORMS = (
    "use batch, seq, the name of another axis, such as height, or without spaces what follows from "
    "one, seq+1, seq-1, 2*seq, seq//2, (seq+1)//2 (half of it, rounded up), or several of these: "
    "(2*seq-3)//4+1; _ (any one dimension) and ... (the rest)"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "batch seq*2",
            f"in_axes has the entry 'batch seq*2' with 'seq*2': {FORMS}",
        ),
        (
            "batch, seq",
            "in_axes has the entry 'batch, seq' with a comma: separate the dimensions by spaces, "
            "'batch seq'",
        ),
        (
            "batch seq//0",
            f"in_axes has the entry 'batch seq//0' with 'seq//0': {FORMS}",
        ),
        (
            "... seq ...",
            "in_axes has the entry '... seq ...' with '...' twice: an array has it once",
        ),
    ],
)
def test_bad_pattern(text, message):
    """A pattern with another name, or with one twice, is refused with what to write."""
    with pytest.raises(ConfigError) as caught:
        AxisPattern.parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("one", "other"),
    [("(2*seq+2)//2", "seq+1"), ("4*seq//2", "2*seq"), ("(4*seq+3)//6", "(2*seq+1)//3")],
)
def test_two_ways_to_write_one_length(one, other):
    """Rules that give the same length at every size are equal."""
    assert Length.parse(one) == Length.parse(other)


@given(
    *(st.integers(1, 6), st.integers(-9, 9), st.integers(1, 6), st.integers(-9, 9)),
    st.integers(1, 40),
)
def test_a_length_is_what_python_says(times, before, over, plus, size):
    """Rules are Python's arithmetic; what they are written as says the same rule again."""
    text = f"({times}*seq{before:+})//{over}{plus:+}"
    length = Length.parse(text)
    assert length is not None
    assert length.of(Bucket(1, size)) == eval(text, {"seq": size})
    assert Length.parse(str(length)) == length
    least = length.least_size
    assert length.of(Bucket(1, least)) >= 1
    assert least == 1 or length.of(Bucket(1, least - 1)) < 1


@pytest.mark.parametrize(
    "text",
    ["\u0662*seq", "seq+\u0661", "(seq)//2", "(seq+1", "seq+1)//2", "(seq+1)*2", "()//2", "seq+"],
)
def test_what_is_no_length(text):
    """Brackets hold a sum, and stand before a division."""
    assert Length.parse(text) is None


@pytest.mark.parametrize(
    ("text", "ndim", "wanted"),
    [
        ("batch seq", 1, "2"),
        ("batch seq", 3, "2"),
        ("batch ... seq", 1, "2 or more"),
        ("", 1, "0"),
    ],
)
def test_bad_rank(text, ndim, wanted):
    """An array of another rank than the pattern says is refused by its name."""
    with pytest.raises(InputShapeError) as caught:
        AxisPattern.parse(text).resolve(ndim, name="ids")
    assert str(caught.value) == (
        f"ids has {ndim} dimension(s), but its axes {text!r} name {wanted}: "
        "reshape it or correct the axes"
    )


SIZE = st.integers(1, 9)


@given(dimensions(), st.lists(SIZE, min_size=6, max_size=6), SIZE, SIZE)
def test_resize_and_open(names, shape, batch, seq):
    """`resize` sets the two bucketed dimensions and no other; `open` blanks the same ones."""
    axes = LeafAxes.at(_index(names, "batch"), _index(names, "seq"))
    shape = tuple(shape[: len(names)])
    new = {"batch": batch, "seq": seq}
    resized = axes.resize(shape, Bucket(batch, seq))
    opened = axes.open(shape)
    for name, before, after, shared in zip(names, shape, resized, opened, strict=True):
        assert after == new.get(name, before)
        assert shared == (None if name in new else before)
    assert axes.passes_through == (axes == PASS_THROUGH) == ({"batch", "seq"}.isdisjoint(names))


@given(st.lists(dimensions()), SIZE, SIZE)
def test_sizes_of_agreeing_arrays(arrays, batch, seq):
    """Arrays that agree give the sizes they carry, and 1 for what none of them carries."""
    size = {"batch": batch, "seq": seq, "_": 7}
    leaves = [
        Leaf(
            f"x[{index}]",
            LeafAxes.at(_index(names, "batch"), _index(names, "seq")),
            tuple(size[name] for name in names),
        )
        for index, names in enumerate(arrays)
    ]
    carried = {name for names in arrays for name in names}
    expected = (batch if "batch" in carried else 1, seq if "seq" in carried else 1)
    assert sizes_of(leaves) == expected


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (4, 57),
            "ids has batch=3 but mask has batch=4: all arrays of one call must have the same batch",
        ),
        (
            (3, 58),
            "ids has seq=57 but mask has seq=58: all arrays of one call must have the same seq",
        ),
    ],
)
def test_sizes_of_disagreeing_arrays(shape, message):
    """Two arrays that disagree are both named, the first that carries the size and the other."""
    leaves = [
        Leaf("params", PASS_THROUGH, (9, 9)),
        Leaf("ids", LeafAxes.at(0, 1), (3, 57)),
        Leaf("types", LeafAxes.at(0, 1), (3, 57)),
        Leaf("mask", LeafAxes.at(0, 1), shape),
    ]
    with pytest.raises(InputShapeError) as caught:
        sizes_of(leaves)
    said, _, advice = str(caught.value).partition(" (")
    assert said == message
    assert 'unpad="none"' in advice


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((), (None, None)),
        ((3,), (0, None)),
        ((57,), (None, None)),
        ((3, 57), (0, 1)),
        ((3, 57, 3, 57), (0, 1)),
        ((3, 8), (0, None)),
        ((8, 57), (None, 1)),
        ((57, 3), (None, None)),
    ],
)
def test_axes_by_size(shape, axes):
    """Without declared axes, only axis 0 can be the batch and only axis 1 the sequence."""
    assert axes_by_size(shape, Bucket(3, 57)) == LeafAxes.at(*axes)
