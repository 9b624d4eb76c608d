"""The README's models of other libraries run as they stand there, and give the plain answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cudagraph_jax import (
    BucketedFunction,
    CUDAGraphConfig,
    PaddingLeakError,
    bucket_jit,
    no_compiles,
)

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SECTION = README.split("\n## Model libraries\n")[1].split("\n## ")[0]
PLAIN, NNX, EQUINOX, HAIKU, DECODER = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
QUICKSTART = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
SIZES = [(1, 1), (1, 16), (2, 17), (3, 57), (4, 64), (5, 3), (7, 33), (8, 64)]
ONE_BUCKET = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0)

Names = dict[str, Any]
Answer = Callable[[Names, np.ndarray, np.ndarray], Any]


@pytest.fixture(scope="module")
def quickstart() -> Names:
    names: Names = {}
    exec(QUICKSTART, names)
    return names


def run(code: str, quickstart: Names) -> Names:
    """The names after the snippet, which starts from the quickstart's."""
    names = dict(quickstart)
    exec(code, names)
    return names


def batch(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and a mask of ragged rows."""
    random = np.random.default_rng(rows * length)
    lengths = random.integers(1, length, rows, endpoint=True)
    mask = (np.arange(length) < lengths[:, None]).astype(np.float32)
    return random.integers(0, 1000, (rows, length), np.int32), mask


def plain_function(names: Names, ids: np.ndarray, mask: np.ndarray) -> Any:
    return names["features"].__wrapped__(names["weights"], ids)


def nnx_model(names: Names, ids: np.ndarray, mask: np.ndarray) -> Any:
    return names["classifier"](ids, mask)


def equinox_model(names: Names, ids: np.ndarray, mask: np.ndarray) -> Any:
    return jax.vmap(jax.vmap(names["tagger"]))(ids)


def haiku_apply(names: Names, ids: np.ndarray, mask: np.ndarray) -> Any:
    return names["network"].apply(names["haiku_params"], ids, mask)


@pytest.mark.parametrize(
    ("code", "function", "first", "takes_mask", "plain", "printed"),
    [
        pytest.param(
            PLAIN, "features", "weights", False, plain_function, "(3, 57, 64)", id="plain"
        ),
        pytest.param(NNX, "classify", "state", True, nnx_model, "(3, 10)", id="nnx"),
        pytest.param(EQUINOX, "tag", "arrays", False, equinox_model, "(3, 57, 5)", id="equinox"),
        pytest.param(HAIKU, "scores", "haiku_params", True, haiku_apply, "(3, 1)", id="haiku"),
    ],
)
def test_a_library(
    quickstart: Names,
    capsys: pytest.CaptureFixture[str],
    code: str,
    function: str,
    first: str,
    takes_mask: bool,
    plain: Answer,
    printed: str,
) -> None:
    """After warm-up ragged calls compile nothing, and give what the library's own call gives."""
    capsys.readouterr()
    names = run(code, quickstart)
    assert capsys.readouterr().out == f"{printed}\n"
    served: BucketedFunction = names[function]
    for rows, length in SIZES:
        ids, mask = batch(rows, length)
        arguments = (names[first], ids, mask)[: 2 + takes_mask]
        with no_compiles():
            found = served(*arguments)
        np.testing.assert_allclose(found, plain(names, ids, mask), 1e-5, 1e-5)


def test_the_decoder(quickstart: Names, capsys: pytest.CaptureFixture[str]) -> None:
    """The decoder's snippet serves 500 steps without a compile."""
    capsys.readouterr()
    names = run(DECODER, quickstart)
    assert capsys.readouterr().out == "(3, 501)\n"
    assert names["decoder"].decode_function.stats()["hits"] == 500


class Counting(nnx.Module):
    """Counts its calls in a variable."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return x * self.factor


def floats(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, length)).astype(np.float32)


def test_nnx_variables_are_returned():
    """Variables that an NNX model changes are kept by whoever returns and passes them on."""
    parts: Any = nnx.split(Counting())
    graphdef, state = parts

    @bucket_jit(in_axes=(None, "batch seq"), unpad=("host", "none"), config=ONE_BUCKET)
    def counted(state, x):
        model = nnx.merge(graphdef, state)
        return model(x), nnx.state(model)

    counted.warmup(state, floats(1, 1), progress=False)
    with no_compiles():
        for rows in (1, 2, 3):
            x = floats(rows, 5)
            y, state = counted(state, x)
            np.testing.assert_array_equal(y, 2 * x)
    assert isinstance(state["calls"][...], jax.Array)
    assert int(state["calls"][...]) == 3


def test_a_static_graphdef():
    """A graphdef may be a static argument: one program for each."""

    @bucket_jit(in_axes=(None, None, "batch seq"), static_argnames="graphdef", config=ONE_BUCKET)
    def scaled(graphdef, state, x):
        return nnx.merge(graphdef, state)(x)

    x = floats(3, 5)
    parts = {factor: nnx.split(Counting(factor)) for factor in (2.0, 3.0)}
    for _ in range(2):
        for factor, (graphdef, state) in parts.items():
            np.testing.assert_array_equal(scaled(graphdef, state, x), np.float32(factor) * x)
    assert scaled.registry.num_graphs == 2


def test_equinox_state_is_returned():
    """Equinox's `State` goes in and comes out like any pytree."""

    class Stateful(eqx.Module):
        index: eqx.nn.StateIndex

        def __init__(self) -> None:
            self.index = eqx.nn.StateIndex(jnp.zeros((), jnp.int32))

        def __call__(self, x, state):
            return x * 2, state.set(self.index, state.get(self.index) + 1)

    model, state = eqx.nn.make_with_state(Stateful)()
    arrays, static = eqx.partition(model, eqx.is_array)

    @bucket_jit(in_axes=(None, None, "batch seq"), unpad=("host", "none"), config=ONE_BUCKET)
    def counted(arrays, state, x):
        return eqx.combine(arrays, static)(x, state)

    counted.warmup(arrays, state, floats(1, 1), progress=False)
    with no_compiles():
        for rows in (1, 2, 3):
            x = floats(rows, 5)
            y, state = counted(arrays, state, x)
            np.testing.assert_array_equal(y, 2 * x)
    assert int(state.get(model.index)) == 3


@pytest.mark.parametrize("rng", [None, 7])
def test_haiku_with_rng_and_state(rng):
    """Haiku's `apply` takes params, state and rng as arguments that are passed through."""

    def forward(x):
        calls = hk.get_state("calls", (), jnp.int32, init=jnp.zeros)
        hk.set_state("calls", calls + 1)
        return x * hk.get_parameter("scale", (), init=hk.initializers.Constant(2.0))

    key = None if rng is None else jax.random.key(rng)
    network = hk.transform_with_state(forward)
    initial: Any = network.init(key, floats(1, 1))
    params, state = initial
    counted = bucket_jit(
        network.apply,
        in_axes=(None, None, None, "batch seq"),
        unpad=("host", "none"),
        config=ONE_BUCKET,
    )
    counted.warmup(params, state, key, floats(1, 1), progress=False)
    with no_compiles():
        for rows in (1, 2, 3):
            x = floats(rows, 5)
            y, state = counted(params, state, key, x)
            np.testing.assert_array_equal(y, 2 * x)
    assert int(state["~"]["calls"]) == 3


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_training_mode_leaks(training):
    """The mean over a batch sees the padding, which `debug_mode` finds; inference does not."""
    model = nnx.BatchNorm(5, use_running_average=not training, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    config = CUDAGraphConfig(capture_sizes=(4,), debug_mode=True, warmup_iterations=0)

    @bucket_jit(in_axes=(None, "batch _"), config=config)
    def normalised(state, x):
        return nnx.merge(graphdef, state)(x)

    x = floats(3, 5)
    if training:
        with pytest.raises(PaddingLeakError):
            normalised(state, x)
    else:
        np.testing.assert_allclose(normalised(state, x), model(x), 1e-5, 1e-5)


def test_random_numbers_have_the_buckets_shape():
    """What is drawn for the real elements is a part of what is drawn for the bucket."""

    def noise(key, x):
        return jax.random.normal(key, x.shape)

    key = jax.random.key(0)
    found = bucket_jit(noise, in_axes=(None, "batch seq"), config=ONE_BUCKET)(key, floats(3, 5))
    np.testing.assert_allclose(found, noise(key, floats(4, 8))[:3, :5], 1e-6, 1e-6)
    assert not np.allclose(found, noise(key, floats(3, 5)))
