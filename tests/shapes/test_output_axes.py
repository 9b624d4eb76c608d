"""Which output dimensions follow the batch and the sequence."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.errors import CaptureError, InputShapeError
from cudagraph_jax.shapes.axes import LeafAxes
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.output_axes import OutputShape, infer_output_axes


def abstractly(function):
    """The evaluation of a function of one float32[batch, seq, 3]."""

    def evaluate(size):
        found = jax.eval_shape(function, jax.ShapeDtypeStruct((*size, 3), jnp.float32))
        return [OutputShape(f"output {i}", x.shape) for i, x in enumerate(jax.tree.leaves(found))]

    return evaluate


BASE = Bucket(4, 16)


def infer(function, *, base=BASE, batches=(8,), lengths=(32,)):
    return infer_output_axes(abstractly(function), base=base, batches=batches, lengths=lengths)


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
    assert found.problem is None
    assert found.checked() == axes


def test_a_cut_that_short_sequences_do_not_fill():
    """What is cut to a fixed length is constant in the grid, and shorter below it: a problem."""
    (found,) = infer(lambda x: x[:, :2])
    assert found.problem is not None
    assert "(4, 1, 3) at (4, 1): dimension 1 follows the sizes" in found.problem


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
        return [OutputShape("y", tuple(sizes.get(name, name) for name in names))]

    (found,) = infer_output_axes(evaluate, base=base, batches=(batch,), lengths=(length,))
    assert found.checked() == (
        names.index("batch") if "batch" in names else None,
        names.index("seq") if "seq" in names else None,
    )


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (lambda x: x.reshape(-1), "(192,) at (batch, seq_len)=(4, 16) and (384,) at (8, 16)"),
        (lambda x: x.reshape(-1, 3), "(64, 3) at (batch, seq_len)=(4, 16) and (128, 3) at (8, 16)"),
        (lambda x: x[:, 1:], "(4, 15, 3) at (batch, seq_len)=(4, 16) and (4, 31, 3) at (4, 32)"),
        (
            lambda x: jnp.concatenate([x, x], 0),
            "(8, 16, 3) at (batch, seq_len)=(4, 16) and (16, 16, 3) at (8, 16)",
        ),
    ],
    ids=["batch*seq*3", "batch*seq", "seq-1", "2*batch"],
)
def test_other_dimensions_are_refused(function, where):
    """A dimension that follows the sizes without being one is a problem, by the output's name."""
    fine, found = infer(lambda x: (x, function(x)))
    assert fine.checked() == (0, 1)
    axis = 1 if "15" in where else 0
    with pytest.raises(InputShapeError) as caught:
        found.checked()
    assert str(caught.value) == found.problem
    assert found.problem == (
        f"output 1 has the shape {where}: dimension {axis} follows the sizes, but is not the one "
        '"batch" or the one "seq" of the output, so it cannot be trimmed; return each as one '
        'dimension of its own, declare out_axes, or ask for unpad="none"'
    )


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: x.sum((1, 2))[:, None] - x.sum((1, 2)), "dimension 1"),
        (lambda x: jnp.einsum("bsd,btd->bst", x, x), "dimension 2"),
        (lambda x: jnp.ones((3,) * (1 + (x.shape[0] > 4))), "its rank"),
        (lambda x: jnp.ones((3,) * (1 + (x.shape[1] > 15))), "its rank"),
    ],
    ids=["batch twice", "seq twice", "rank by batch", "rank by seq"],
)
def test_what_cannot_be_trimmed_is_refused(function, what):
    """One size in two dimensions, or in the rank, is a problem too."""
    (found,) = infer(function)
    assert what in (found.problem or "")


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
    assert found.checked() == LeafAxes()
    (found,) = infer(lambda x: x, lengths=())
    assert found.checked() == LeafAxes(0, None)
    (found,) = infer(lambda x: x, batches=())
    assert found.checked() == LeafAxes(None, 1)


def only_at(*sizes):
    """An evaluation that takes these sizes and no other."""

    def evaluate(size):
        if size not in sizes:
            raise CaptureError(f"not at {size}", stage="trace")
        return [OutputShape("the output", tuple(size))]

    return evaluate


def test_sizes_are_tried_until_one_evaluates():
    """A size that the function does not take is passed over for the next one."""
    (found,) = infer_output_axes(
        only_at((4, 16), (6, 16), (4, 24)), base=BASE, batches=(8, 6), lengths=(32, 24)
    )
    assert found.checked() == (0, 1)


@pytest.mark.parametrize(
    ("sizes", "axis"),
    [([(4, 16), (4, 32)], "batch"), ([(4, 16), (8, 16)], "seq"), ([(4, 16)], "batch")],
)
def test_axes_that_cannot_be_probed(sizes, axis):
    """Where no second size evaluates, the axes are not guessed."""
    (found,) = infer_output_axes(only_at(*sizes), base=BASE, batches=(8, 6), lengths=(32, 24))
    assert found.problem == (
        "the output: its axes cannot be found, because the function takes no second "
        f"{axis} size: declare out_axes"
    )


def test_errors_are_the_callers():
    """An error at the base size, or one that is none of the package's, is not swallowed."""
    with pytest.raises(CaptureError, match="not at 4x16"):
        infer_output_axes(only_at(), base=BASE, batches=(8,), lengths=())

    def broken(size):
        if size != (4, 16):
            raise ZeroDivisionError
        return []

    with pytest.raises(ZeroDivisionError):
        infer_output_axes(broken, base=BASE, batches=(8,), lengths=())


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
    if found.problem is None:
        shape = (extent(*base),)
        for size in itertools.product(range(1, base[0] + 1), range(1, base[1] + 1)):
            assert found.axes.resize(shape, Bucket(*size)) == (extent(*size),)
