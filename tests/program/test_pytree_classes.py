"""Pytree classes that refuse what is no array, as `jax.jit` lets them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, bucket_jit
from cudagraph_jax.xla.stages import lower_function


@jax.tree_util.register_pytree_node_class
class Boxes:
    """Corners, (batch, 4): refuses any other shape when it is made."""

    def __init__(self, corners):
        assert corners.shape[-1] == 4
        self.corners = corners

    def tree_flatten(self):
        return (self.corners,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@jax.tree_util.register_pytree_node_class
class Checked(Boxes):
    """The same, of real arrays alone."""

    def __init__(self, corners):
        if not isinstance(corners, np.ndarray | jax.Array):
            raise TypeError(f"{corners!r} is no array")
        super().__init__(corners)


@jax.tree_util.register_pytree_node_class
class Flat(Boxes):
    """The same, of what has a number of dimensions."""

    def __init__(self, corners):
        assert corners.ndim == 2
        super().__init__(corners)


CONFIG = CUDAGraphConfig(capture_sizes=(2, 4), capture_seq_lens=(4,), warmup_iterations=1)
CORNERS = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(params=[Boxes, Flat, Checked])
def boxes(request):
    """Classes that refuse more and more of what JAX puts in the place of arrays."""
    return request.param


def grown(boxes):
    return type(boxes)(boxes.corners + 1)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_a_bucketed_argument_and_output(boxes, as_array):
    """It goes in, padded, and comes out, trimmed, on a first call and on later ones."""
    function = bucket_jit(grown, in_axes="batch _", config=CONFIG)
    for _ in range(3):
        answer = function(boxes(as_array(CORNERS)))
        assert type(answer) is boxes
        np.testing.assert_array_equal(answer.corners, CORNERS + 1)


def test_an_argument_that_is_passed_through(boxes):
    """It may hold parameters, be warmed up with, explained and replayed."""
    function = bucket_jit(
        lambda boxes, x: x * boxes.corners.sum(), in_axes=(None, "batch seq"), config=CONFIG
    )
    x = np.ones((3, 4), np.float32)
    assert function.warmup(boxes(jnp.asarray(CORNERS)), x, progress=False).captured == 2
    np.testing.assert_array_equal(function(boxes(jnp.asarray(CORNERS)), x), x * CORNERS.sum())
    assert function.explain(boxes(jnp.asarray(CORNERS)), x).mode.name == "REPLAY"


def test_the_other_doors(boxes):
    """A keyword, a donated argument, pieces of a batch, and `execute_or_capture` take it too."""
    by_keyword = bucket_jit(
        lambda x, *, boxes: x + boxes.corners.sum(), in_axes="batch _", config=CONFIG
    )
    np.testing.assert_array_equal(
        by_keyword(CORNERS, boxes=boxes(CORNERS)), CORNERS + CORNERS.sum()
    )
    donated = bucket_jit(grown, in_axes="batch _", donate_argnums=0, config=CONFIG)
    np.testing.assert_array_equal(donated(boxes(jnp.asarray(CORNERS))).corners, CORNERS + 1)
    many = np.concatenate([CORNERS] * 3)
    split = bucket_jit(
        grown,
        in_axes="batch _",
        config=CUDAGraphConfig(capture_sizes=(2, 4), on_overflow="split"),
    )
    np.testing.assert_array_equal(split(boxes(many)).corners, many + 1)
    manager = CUDAGraphManager(CONFIG)
    answer = manager.execute_or_capture(3, 1, grown, boxes(CORNERS))
    np.testing.assert_array_equal(answer.corners, CORNERS + 1)


def test_debug_mode(boxes):
    """Its check of each new bucket builds the class of arrays, too."""
    function = bucket_jit(
        grown,
        in_axes="batch _",
        config=CUDAGraphConfig(capture_sizes=(2, 4), debug_mode=True),
    )
    np.testing.assert_array_equal(function(boxes(CORNERS)).corners, CORNERS + 1)


@pytest.mark.parametrize("fingerprint", [None, "v1"])
def test_a_store(boxes, tmp_path, fingerprint):
    """What was compiled for such a class is loaded for it."""
    loaded = []
    for _ in range(2):
        function = bucket_jit(
            lambda boxes, x: x * boxes.corners.sum(),
            in_axes=(None, "batch seq"),
            config=CONFIG,
            store=tmp_path / "store",
            fingerprint=fingerprint,
        )
        x = np.ones((3, 4), np.float32)
        for _ in range(2):
            np.testing.assert_array_equal(function(boxes(CORNERS), x), x * CORNERS.sum())
        loaded.append(function.registry.load_count)
    assert loaded == [0, 1]


def test_another_structure_is_another_program(boxes):
    """Classes of one shape do not answer for each other."""
    function = bucket_jit(grown, in_axes="batch _", config=CONFIG)
    others = [Boxes, Flat, Checked]
    for kind in (boxes, *others):
        assert type(function(kind(CORNERS))) is kind


def test_it_lowers_to_the_same(boxes):
    """Leaves, masks and donated arguments are those of a class that takes anything."""

    def scaled(x, boxes, *, mask):
        return x + 1, boxes["a"].corners * 2, boxes["b"].corners * mask

    def lowered(kind):
        args = (np.zeros(3, np.float32), {"a": kind(CORNERS), "b": kind(CORNERS)})
        kwargs = {"mask": jax.ShapeDtypeStruct((4,), np.bool_)}
        lowering = lower_function(scaled, args, kwargs, name="scaled", donate_argnums=(1,))
        taken: jax.tree_util.PyTreeDef = lowering.lowered.in_tree
        assert taken == jax.tree.structure((args, kwargs))
        return lowering

    plain, own = lowered(Boxes), lowered(boxes)
    assert own.text == plain.text
    assert own.text.count("tf.aliasing_output") == 2
    assert plain.drops_arguments is own.drops_arguments is False
