"""Outputs that follow the sizes in a way of their own: the plain function's, at every size."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import Batcher, CUDAGraphConfig, InputShapeError, bucket_jit, no_compiles
from tests.helpers.warm_servers import Counted

CONFIG = CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(8, 16), warmup_iterations=1)
FEWER = dataclasses.replace(CONFIG, capture_sizes=(1, 4))
SIZES = [(1, 1), (2, 2), (3, 5), (3, 13), (4, 8), (4, 9)]  # in three of its buckets


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Packed:
    """Values, and a length that is static."""

    values: jax.Array
    length: int = dataclasses.field(metadata={"static": True})


def rows(shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 7 + 1


def halves(x):
    return x[:, : x.shape[1] // 2]


def pairs(x):
    return jnp.einsum("bs,bt->bst", x, x)


@jax.jit
def filled_up(x):
    return jnp.pad(x, ((0, 0), (0, (1 << (x.shape[1] - 1).bit_length()) - x.shape[1])))


@jax.jit
def convolved(x):
    return jax.lax.conv_general_dilated(x[:, None], jnp.ones((1, 1, 5)), (1,), "VALID")[:, 0]


def whole_pairs(x):
    return x[:, : x.shape[1] // 2 * 2]


FOLLOWING = {
    "every second": lambda x: x[:, ::2],
    "half": halves,
    "one more": jax.jit(lambda x: jnp.pad(x, ((0, 0), (1, 0)))),
    "one less": lambda x: x[:, :-1],
    "each twice": jax.jit(lambda x: jnp.repeat(x, 2, axis=1)),
    "cut to 4": lambda x: x[:, :4],
    "pairs": pairs,
    "up to a power of two": filled_up,
    "down to an even one": whole_pairs,
    "less a long kernel": convolved,
    "rows by rows": lambda x: x[:, :1] - x[:, 0],
    "differences": lambda x: x[:, 1:] - x[:, :-1],
    "each row three times": jax.jit(lambda x: jnp.repeat(x, 3, axis=0)),
    "several": lambda x: {"pairs": pairs(x), "half": halves(x), "same": x * 2, "rows": x[:, 0]},
}


@pytest.mark.parametrize("unpad", ["host", "device"])
@pytest.mark.parametrize("function", FOLLOWING.values(), ids=FOLLOWING)
def test_lengths(function, unpad):
    """Half of a size, one more, the same one twice: cut to what the function has at these sizes."""
    call = bucket_jit(function, in_axes="batch seq", unpad=unpad, config=FEWER)
    for shape in SIZES:
        x = rows(shape)
        expected = function(x)  # by NumPy, or one program of JAX's
        for _ in range(2):
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), call(x), expected)


@pytest.mark.parametrize(
    ("function", "out_axes"),
    [
        (pairs, "batch seq _"),
        (pairs, "batch ..."),
        (halves, "batch ..."),
        (halves, "batch _"),
        (filled_up, "batch _"),
        (lambda x: (x, halves(x)), ("batch seq", "batch _")),
        (lambda x: x * 2, "batch _"),
        (lambda x: x[:, ::2], "batch (seq+1)//2"),
        (lambda x: x[::2, ::3], "(batch+1)//2 (seq+2)//3"),
    ],
)
def test_declared_axes_beside_them(function, out_axes):
    """What `out_axes` has a rule for, or does not name, is as in the plain function."""
    call = bucket_jit(function, in_axes="batch seq", out_axes=out_axes, config=FEWER)
    for shape in SIZES:
        jax.tree.map(np.testing.assert_allclose, call(rows(shape)), function(rows(shape)))


def test_declared_axes_that_are_as_long_as_one_bucket():
    """An output of a fixed length that a bucket has, too, is no sequence: refused in each."""

    def fixed(x):
        return jnp.tile(x.sum(1)[:, None], (1, 8))

    call = bucket_jit(fixed, in_axes="batch seq", out_axes="batch seq", config=CONFIG)
    for shape in SIZES:
        with pytest.raises(InputShapeError, match="correct out_axes"):
            call(rows(shape))
    found = bucket_jit(fixed, in_axes="batch seq", config=CONFIG)
    np.testing.assert_allclose(found(rows((3, 5))), fixed(rows((3, 5))), rtol=1e-6)


@pytest.mark.parametrize("function", [filled_up, whole_pairs])
def test_declared_axes_that_equal_every_size_of_the_grid(function):
    """A length that is rounded to even numbers, or to powers of two, is no sequence: refused."""
    call = bucket_jit(function, in_axes="batch seq", out_axes="batch seq", config=CONFIG)
    for shape in SIZES:
        with pytest.raises(InputShapeError, match="correct out_axes"):
            call(rows(shape))


@pytest.mark.parametrize("threshold", [4, 12], ids=["within a bucket", "between two buckets"])
@pytest.mark.parametrize("out_axes", [None, "batch seq"])
def test_a_dtype_that_follows_a_size(out_axes, threshold):
    """An output whose dtype depends on the size is the plain function's, or refused."""

    def kinds(x):
        return x.astype(jnp.float16 if x.shape[1] > threshold else jnp.float32)

    call = bucket_jit(kinds, in_axes="batch seq", out_axes=out_axes, config=CONFIG)
    for shape in ((3, 5), (2, 12), (2, 13), (1, 16)):
        if (threshold, shape) == (12, (3, 5)):  # in a bucket where all sizes have the same
            assert call(rows(shape)).dtype == np.float32
            continue
        with pytest.raises(InputShapeError, match=r"float16 at \(batch, seq_len\)="):
            call(rows(shape))


def test_declared_axes_of_a_function_that_takes_one_size():
    """Where no other size can be traced, the function is asked at the sizes of each call."""

    def only(x):
        if x.shape != (4, 8):
            raise TypeError("another size")
        return x * 2

    config = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,))
    call = bucket_jit(only, in_axes="batch seq", out_axes="batch seq", config=config)
    np.testing.assert_allclose(call(rows((4, 8))), rows((4, 8)) * 2)
    with pytest.raises(InputShapeError, match=r"does not take a call of .*another size"):
        call(rows((3, 5)))


@pytest.mark.parametrize("unpad", ["host", "device"])
def test_what_is_static_in_an_output(unpad):
    """A static field has the value that the plain function gives it."""

    def packed(x):
        return Packed(x * 2, x.shape[1]), {"rows": Packed(x[:, 0], x.shape[0])}

    call = bucket_jit(packed, in_axes="batch seq", unpad=unpad, config=CONFIG)
    for shape in SIZES:
        for _ in range(2):
            tokens, others = call(rows(shape))
            assert (tokens.length, others["rows"].length) == (shape[1], shape[0])
            np.testing.assert_allclose(tokens.values, rows(shape) * 2)


@pytest.mark.parametrize("unpad", ["host", "device", "none", "padded"])
def test_what_is_static_in_an_output_of_pieces_and_items(unpad):
    """What is static is that of the whole answer to a split call, and to an item its own."""

    def packed(x):
        return Packed(x * 2, x.shape[1]), {"rows": Packed(x[:, 0], x.shape[0])}

    config = dataclasses.replace(CONFIG, on_overflow="split", debug_mode=True)
    call = bucket_jit(packed, in_axes="batch seq", unpad=unpad, config=config)
    for shape in ((5, 5), (9, 8), (9, 3)):
        tokens, others = call(rows(shape))
        assert (tokens.length, others["rows"].length) == (shape[1], shape[0])
        found = np.asarray(tokens.values)[: shape[0], : shape[1]]
        np.testing.assert_allclose(found, rows(shape) * 2)
    if unpad == "none":
        return  # a batcher does not take it without out_axes
    with Batcher(call) as batcher:
        items = [np.ones(length, np.float32) for length in (5, 8, 3)]
        for item, (tokens, others) in zip(items, batcher.map(items), strict=True):
            assert (tokens.length, others["rows"].length) == (len(item), 1)
            np.testing.assert_allclose(tokens.values, item * 2)


def test_a_warm_function_compiles_nothing():
    """The function is traced once for each new size, and nothing is compiled."""
    function = Counted(lambda x: (halves(x), Packed(x, x.shape[1])))
    call = bucket_jit(function, in_axes="batch seq", config=CONFIG)
    call.warmup(rows((3, 5)), progress=False)
    before = function.calls
    with no_compiles():
        for shape in ((3, 5), (3, 5), (1, 13), (3, 5)):
            half, packed = call(rows(shape))
            assert half.shape == (shape[0], shape[1] // 2)
            assert packed.length == shape[1]
    assert function.calls == before + 2


def test_from_a_store(tmp_path):
    """A restarted server cuts them alike."""

    def answers(call):
        return [call(rows(shape)) for shape in ((3, 5), (2, 13))]

    for _ in range(2):
        call = bucket_jit(
            lambda x: (halves(x), {"pairs": pairs(x)}, Packed(x, x.shape[1])),
            in_axes="batch seq",
            config=CONFIG,
            store=tmp_path / "store",
            name="following",
            fingerprint="v1",
        )
        for half, both, packed in answers(call):
            assert both["pairs"].shape == (*packed.values.shape, packed.values.shape[1])
            assert half.shape[1] == packed.length // 2
    assert call.stats()["store"]["hits"] == 2


def test_in_pieces():
    """A batch in pieces is joined, lengths that follow the sequence being those of the whole."""
    config = CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(8, 16), on_overflow="split")
    call = bucket_jit(lambda x: (halves(x), pairs(x)), in_axes="batch seq", config=config)
    x = rows((11, 5))
    for found, expected in zip(call(x), (halves(x), pairs(x)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    by_rows = bucket_jit(lambda x: jnp.repeat(x, 2, axis=0), in_axes="batch seq", config=config)
    with pytest.raises(InputShapeError, match="cannot join"):
        by_rows(x)


def test_in_debug_mode():
    """The check of a new bucket compares what the caller gets."""
    config = CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(8, 16), debug_mode=True)
    call = bucket_jit(lambda x: (halves(x), pairs(x)), in_axes="batch seq", config=config)
    half, both = call(rows((3, 5)))
    np.testing.assert_allclose(half, halves(rows((3, 5))))
    np.testing.assert_allclose(both, pairs(rows((3, 5))), rtol=1e-6)


def test_an_output_that_is_longer_than_in_the_bucket():
    """It cannot be cut out of the bucket's, and is refused instead of cut short."""

    def rest(x):
        return jnp.ones((x.shape[0], x.shape[1] % 5))

    call = bucket_jit(rest, in_axes="batch seq", config=CONFIG)
    assert call(rows((2, 2))).shape == (2, 2)
    with pytest.raises(
        InputShapeError, match=r"\(2, 4\) at .*, more than in the bucket 2x8, \(2, 3\)"
    ):
        call(rows((2, 4)))
    whole = bucket_jit(rest, in_axes="batch seq", unpad="none", config=CONFIG)
    assert whole(rows((2, 4))).shape == (2, 3)
