"""Which output dimensions follow the batch and the sequence."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.errors import CaptureError, InputShapeError
from cudagraph_jax.shapes.axes import LeafAxes, Length
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.output_axes import (
    OutputAxes,
    OutputsAtSize,
    OutputShape,
    Probes,
    check_declared_axes,
    infer_output_axes,
)


def abstractly(function):
    """The evaluation of a function of one float32[batch, seq, 3]."""

    def evaluate(size):
        found = jax.eval_shape(function, jax.ShapeDtypeStruct((*size, 3), jnp.float32))
        leaves, structure = jax.tree.flatten(found)
        shapes = [OutputShape(f"output {i}", x.shape) for i, x in enumerate(leaves)]
        return OutputsAtSize(shapes, structure)

    return evaluate


BASE = Bucket(4, 16)


def infer(function, *, base=BASE, batches=(8,), lengths=(32,)):
    return found_by(abstractly(function), base=base, batches=batches, lengths=lengths)


def found_by(evaluate, *, base, batches, lengths):
    return infer_output_axes(probes(evaluate, base=base, batches=batches, lengths=lengths)).outputs


def probes(evaluate, *, base=BASE, batches=(8,), lengths=(32,)):
    return Probes(
        evaluate, base, {axis: n for axis, n in (("batch", batches), ("seq", lengths)) if n}
    )


@pytest.mark.parametrize(
    ("function", "axes"),
    [
        (lambda x: x, (0, 1)),
        (lambda x: x.sum(2), (0, 1)),
        (lambda x: x.transpose(2, 1, 0), (2, 1)),
        (lambda x: x.mean(1), (0, None)),
        (lambda x: x.mean((0, 2)), (None, 0)),
        (lambda x: x.sum(), (None, None)),
        (lambda x: x @ jnp.ones((3, 16)), (0, 1)),
        (lambda x: jnp.ones((4, 16, 8, 32)), (None, None)),
        (lambda x: jnp.zeros((x.shape[1], 4, 16)), (None, 0)),
    ],
)
def test_function(function, axes):
    """The batch and the sequence are found wherever they are, and constants are told from them."""
    (found,) = infer(function)
    assert found == (found.name, LeafAxes.at(*axes), None, ())


@given(st.data())
def test_any_arrangement(data):
    """Any order of batch, seq and constants is found at any sizes, equal ones and 1 too."""
    size = st.integers(1, 6)
    base = Bucket(data.draw(size), data.draw(size))
    batch = data.draw(size.filter(lambda n: n != base.batch_size))
    length = data.draw(size.filter(lambda n: n != base.seq_len))
    carried = data.draw(st.lists(st.sampled_from(["batch", "seq"]), unique=True))
    names = data.draw(st.permutations([*carried, *data.draw(st.lists(size, max_size=3))]))

    def evaluate(at):
        sizes = {"batch": at.batch_size, "seq": at.seq_len}
        return OutputsAtSize([OutputShape("y", tuple(sizes.get(name, name) for name in names))])

    (found,) = found_by(evaluate, base=base, batches=(batch,), lengths=(length,))
    assert found.problem is None
    assert found.axes == LeafAxes.at(
        names.index("batch") if "batch" in names else None,
        names.index("seq") if "seq" in names else None,
    )


@pytest.mark.parametrize(
    ("function", "axes", "follows"),
    [
        (lambda x: x[:, 1:], (0, None), [(1, "seq")]),
        (lambda x: x[:, ::2], (0, None), [(1, "seq")]),
        (lambda x: x[:, :2], (0, None), [(1, "seq")]),
        (lambda x: x[: x.shape[0] // 3], (None, 1), [(0, "batch")]),
        (lambda x: jnp.concatenate([x, x], 0), (None, 1), [(0, "batch")]),
        (lambda x: jnp.pad(x, ((0, 0), (0, 1), (0, 0))), (0, None), [(1, "seq")]),
        (lambda x: jnp.zeros((2 * x.shape[0], x.shape[1] - 1)), (None, None), None),
    ],
    ids=["s-1", "s/2", "min(s,2)", "b/3", "2b", "s+1", "2b and s-1"],
)
def test_lengths_that_follow_one_size(function, axes, follows):
    """Half of a size, one more, or the same one again: the dimension is known, not its length."""
    fine, found = infer(lambda x: (x, function(x)))
    assert fine.axes == LeafAxes.at(0, 1)
    follows = [(0, "batch"), (1, "seq")] if follows is None else follows
    assert found == ("output 1", LeafAxes.at(*axes), None, tuple(follows))


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: jnp.einsum("bsd,btd->bst", x, x), ("batch", "seq", "seq")),
        (lambda x: x.sum((1, 2))[:, None] - x.sum((1, 2)), ("batch", "batch")),
    ],
)
def test_an_axis_twice(function, names):
    """A size may be the length of several dimensions."""
    (found,) = infer(function)
    assert found.axes == LeafAxes(tuple(enumerate(map(Length, names))))
    assert found.follows == ()


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (lambda x: x.reshape(-1), "(192,) at (batch, seq_len)=(4, 16) and (144,) at (3, 16)"),
        (lambda x: x.reshape(-1, 3), "(64, 3) at (batch, seq_len)=(4, 16) and (48, 3) at (3, 16)"),
        (
            lambda x: jnp.zeros((min(x.shape[0] * x.shape[1], 2), 3)),
            "(2, 3) at (batch, seq_len)=(4, 16) and (1, 3) at (1, 1)",
        ),
        (
            lambda x: jnp.zeros((min(x.shape[:2]), 3)),
            "(4, 3) at (batch, seq_len)=(4, 16) and (3, 3) at (3, 16)",
        ),
    ],
    ids=["batch*seq*3", "batch*seq", "min(batch*seq, 2)", "min(batch, seq)"],
)
def test_what_follows_both_sizes_is_refused(function, where):
    """A dimension that follows both sizes is a problem, by the output's name."""
    fine, found = infer(lambda x: (x, function(x)))
    assert fine.axes == LeafAxes.at(0, 1)
    with pytest.raises(InputShapeError) as caught:
        found.check()
    assert str(caught.value) == found.problem
    if "(1, 1)" in where:
        return
    assert found.problem == (
        f"output 1 has the shape {where}: dimension 0 follows the sizes, but is no length that "
        "follows one of them, so it cannot be trimmed; return each size as a dimension of "
        'its own, or ask for unpad="none"'
    )


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: jnp.ones((3,) * (1 + (x.shape[0] > 3))), "its rank"),
        (lambda x: jnp.ones((3,) * (1 + (x.shape[1] > 15))), "its rank"),
        (lambda x: jnp.ones((4, x.shape[1] ** 2)), "dimension 1"),
        (lambda x: jnp.ones((100 - x.shape[0], 3)), "dimension 0"),
    ],
    ids=["rank by batch", "rank by seq", "seq*seq", "100-batch"],
)
def test_what_cannot_be_trimmed_is_refused(function, what):
    """So is a rank that follows a size, and what does not begin with the real elements."""
    (found,) = infer(function)
    assert what in (found.problem or "")


def test_a_length_that_falls_first():
    """Where the shortest size alone is to blame, the error says so, and what declares the rest."""
    (problem,) = infer(lambda x: jnp.ones((abs(x.shape[1] - 3) + 1, 3)))
    assert "it is 3 where seq is 1, and 1 where that is 3" in (problem.problem or "")
    assert 'say it in out_axes, as "seq-1"' in (problem.problem or "")
    (problem,) = infer(lambda x: jnp.ones((100 - x.shape[1], 3)))
    assert "out_axes" not in (problem.problem or "")


@pytest.mark.parametrize("base", [Bucket(n, m) for n in (1, 2, 3, 4, 8) for m in (1, 2, 3, 4, 8)])
@pytest.mark.parametrize(
    "length",
    [min, max, lambda b, s: b * s, lambda b, s: b + s, lambda b, s: min(b * s, 2)],
    ids=["min", "max", "product", "sum", "least product"],
)
def test_no_length_of_both_sizes_passes_for_one(base, length):
    """Wherever the search begins, what follows both sizes is neither of them, nor a constant."""

    def evaluate(size):
        return OutputsAtSize([OutputShape("y", (length(*size),))])

    (found,) = found_by(evaluate, base=base, batches=(16,), lengths=(16,))
    if found.problem is None and not found.follows:
        for size in itertools.product(range(1, base[0] + 1), range(1, base[1] + 1)):
            assert found.axes.resize((length(*base),), Bucket(*size)) == (length(*size),)


def test_a_structure_that_follows():
    """What is static in the outputs is compared, too."""

    def evaluate(size):
        return OutputsAtSize([OutputShape("y", tuple(size))], structure=size.seq_len)

    assert infer_output_axes(probes(evaluate)).structure_follows
    assert infer_output_axes(probes(evaluate, batches=())).structure_follows
    assert not infer_output_axes(probes(evaluate, lengths=())).structure_follows


@pytest.mark.parametrize(
    ("function", "axes", "follows"),
    [
        (lambda x: x.sum(2), (0, 1), ()),
        (lambda x: x.sum(2)[:, ::2], (0, None), ((1, "seq"),)),
        (lambda x: jnp.einsum("bsd,btd->bst", x, x), (0, 1), ((2, "seq"),)),
        (lambda x: x.sum(2), (0, None), ((1, "seq"),)),
    ],
)
def test_declared_axes_and_what_was_not_named(function, axes, follows):
    """Declared axes are checked at another size; what follows a size beside them is found."""
    declared = [OutputAxes("output 0", LeafAxes.at(*axes))]
    (found,) = check_declared_axes(probes(abstractly(function)), declared).outputs
    assert found == ("output 0", LeafAxes.at(*axes), None, follows)


def test_declared_axes_that_do_not_follow():
    """An axis that is no axis, but as long as one bucket, is a problem."""
    fixed = probes(abstractly(lambda x: jnp.ones((x.shape[0], 16))))
    (found,) = check_declared_axes(fixed, [OutputAxes("output 0", LeafAxes.at(0, 1))]).outputs
    assert found.problem == (
        "out_axes calls dimension 1 of output 0 'seq', which has the shape (4, 16) at "
        "(batch, seq_len)=(4, 16), but (5, 16) at (5, 3): correct out_axes, or leave it out to "
        "have the axes found"
    )


@pytest.mark.parametrize(("base", "other"), [(4, 8), (8, 4)])
@pytest.mark.parametrize("axis", ["batch", "seq"])
def test_number_of_outputs(base, other, axis):
    """As many outputs as there are rows or positions cannot be trimmed, and that is said."""
    sizes = {"batches": (other,), "lengths": ()} if axis == "batch" else {"lengths": (other,)}
    found = infer(
        lambda x: list(x if axis == "batch" else x.transpose(1, 0, 2)),
        base=Bucket(base, base),
        **{"batches": (), **sizes},
    )
    assert found
    assert all(output.problem for output in found)


def test_sizes_that_the_inputs_do_not_carry():
    """Without other sizes to try, nothing follows, and the base alone is evaluated."""
    (found,) = infer(lambda x: x, batches=(), lengths=())
    assert found.axes == LeafAxes()
    (found,) = infer(lambda x: x, lengths=())
    assert found.axes == LeafAxes.at(0, None)
    (found,) = infer(lambda x: x, batches=())
    assert found.axes == LeafAxes.at(None, 1)


def only_at(*sizes):
    """An evaluation that takes these sizes and no other."""

    def evaluate(size):
        if size not in sizes:
            raise CaptureError(f"not at {size}", stage="trace")
        return OutputsAtSize([OutputShape("the output", tuple(size))])

    return evaluate


def test_sizes_are_tried_until_one_evaluates():
    """A size that the function does not take is passed over for the next one."""
    (found,) = found_by(
        only_at((4, 16), (6, 16), (4, 24)), base=BASE, batches=(8, 6), lengths=(32, 24)
    )
    assert found.axes == LeafAxes.at(0, 1)


@pytest.mark.parametrize(
    ("sizes", "axis"),
    [([(4, 16), (4, 32)], "batch"), ([(4, 16), (8, 16)], "seq"), ([(4, 16)], "batch")],
)
def test_axes_that_cannot_be_probed(sizes, axis):
    """Where no second size evaluates, the axes are not guessed, and what it says there is told."""
    (found,) = found_by(only_at(*sizes), base=BASE, batches=(8, 6), lengths=(32, 24))
    at = (8, 16) if axis == "batch" else (4, 32)
    assert found.problem == (
        "the output: its axes cannot be found, because the function takes no second "
        f"{axis} size (not at {at[0]}x{at[1]}, at (batch, seq_len)={at}): declare out_axes"
    )


def test_errors_are_the_callers():
    """An error at the base size, or one that is none of the package's, is not swallowed."""
    with pytest.raises(CaptureError, match="not at 4x16"):
        found_by(only_at(), base=BASE, batches=(8,), lengths=())

    def broken(size):
        if size != (4, 16):
            raise ZeroDivisionError
        return OutputsAtSize([])

    with pytest.raises(ZeroDivisionError):
        found_by(broken, base=BASE, batches=(8,), lengths=())


@pytest.mark.parametrize(
    "base", [Bucket(1, 2), Bucket(2, 2), Bucket(4, 2), Bucket(4, 5), Bucket(4, 16)]
)
@pytest.mark.parametrize(
    "extent",
    [
        lambda b, s: b * s,
        lambda b, s: b + s,
        lambda b, s: -(-b * s // 2),
        lambda b, s: s * -(-b // 2),
        lambda b, s: min(b * s, 9),
        lambda b, s: s // 2 + 1,
        lambda b, s: 2 * b,
    ],
)
def test_what_follows_both_sizes_is_no_constant(extent, base):
    """A product or a sum of the sizes is a problem wherever a smaller request would differ."""
    (found,) = infer(lambda x: jnp.ones(extent(*x.shape[:2])), base=base)
    if found.problem is None and not found.follows:
        shape = (extent(*base),)
        for size in itertools.product(range(1, base[0] + 1), range(1, base[1] + 1)):
            assert found.axes.resize(shape, Bucket(*size)) == (extent(*size),)
