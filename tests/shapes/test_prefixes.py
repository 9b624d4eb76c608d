"""Pytree prefixes."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.errors import InputShapeError
from cudagraph_jax.shapes.pytrees import (
    broadcast_prefix,
    for_positions,
    is_declaration,
    leaf_names,
)

TREES = st.recursive(
    st.integers() | st.none(),
    lambda below: (
        st.lists(below, max_size=3)
        | st.lists(below, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), below, max_size=3)
    ),
)


@given(TREES, st.sampled_from([None, "batch", 0, 1.5, True]))
def test_one_declaration_stands_for_all(tree, declaration):
    """A single declaration is that of every leaf of any tree."""
    found = broadcast_prefix(declaration, tree, name="pad_values")
    assert found == [declaration] * len(jax.tree.leaves(tree))


@given(st.lists(TREES, max_size=4))
def test_each_declaration_stands_for_its_subtree(trees):
    """Each entry is the declaration of all the leaves at its place, in the order of the leaves."""
    found = broadcast_prefix(list(range(len(trees))), trees, name="in_axes")
    assert found == [
        place for place, tree in enumerate(trees) for _ in range(len(jax.tree.leaves(tree)))
    ]


def test_nested():
    """A prefix may go deeper in one place than in another; None declares, and empties have none."""
    tree = ({"ids": 1, "mask": (2, 3)}, [4, 5], None)
    prefix = ({"ids": "batch", "mask": ("seq", None)}, None, "batch")
    found = broadcast_prefix(prefix, tree, name="in_axes")
    assert found == ["batch", "seq", None, None, None]


def test_own_leaves():
    """The caller may say what a leaf of the prefix is."""
    found = broadcast_prefix(
        [("a", "b")], [(1, 2, 3)], name="x", leaf=lambda value: isinstance(value, tuple)
    )
    assert found == [("a", "b")] * 3


@pytest.mark.parametrize(
    ("prefix", "tree", "reason"),
    [
        (("a", "b"), [1, 2], "Expected tuple, got [1, 2]."),
        (("a", "b"), (1, 2, 3), "Tuple arity mismatch: 3 != 2; tuple: (1, 2, 3)."),
        ({"a": "batch"}, {"b": 1}, ""),
        ([["a"]], [1], ""),
    ],
)
def test_mismatch(prefix, tree, reason):
    """A prefix of another structure is refused by its name, in one line."""
    with pytest.raises(InputShapeError) as caught:
        broadcast_prefix(prefix, tree, name="in_axes")
    message = str(caught.value)
    assert message.startswith(
        f"in_axes={prefix!r} does not match the structure of what it describes: {reason}"
    )
    assert "\n" not in message


@pytest.mark.parametrize(
    ("value", "declares"),
    [(None, True), ("batch", True), (0, True), (1.5, True), ((), False), ([1], False), ({}, False)],
)
def test_is_declaration(value, declares):
    """Text, scalars and None declare; containers hold declarations."""
    assert is_declaration(value) is declares


@given(st.lists(st.sampled_from(["batch", "seq"]), max_size=4), st.integers(0, 6))
def test_for_positions(prefix, count):
    """A sequence has an entry for each argument, and more arguments than entries are refused."""
    if count <= len(prefix):
        assert list(for_positions(prefix, count, name="in_axes")) == prefix[:count]
        return
    with pytest.raises(InputShapeError) as caught:
        for_positions(tuple(prefix), count, name="in_axes")
    assert str(caught.value) == (
        f"in_axes has {len(prefix)} entries, but the call has {count} positional arguments: "
        "give one entry for each argument (None for what is passed through)"
    )


@pytest.mark.parametrize("prefix", ["batch seq", None, 0, {"a": 1}])
def test_one_entry_for_all_positions(prefix):
    """What is no sequence stands for every argument."""
    assert list(for_positions(prefix, 3, name="in_axes")) == [prefix] * 3
    assert list(for_positions(prefix, 0, name="in_axes")) == []


def test_leaf_names():
    """Errors call a leaf by its argument and its path."""
    args = (1, {"mask": 2, "ids": [3]}, (), (4, None, 5))
    assert leaf_names(["x", "batch", "empty", "states"], args) == [
        "x",
        "batch['ids'][0]",
        "batch['mask']",
        "states[0]",
        "states[2]",
    ]
