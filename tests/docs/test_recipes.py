"""The recipes run as they stand on their pages, and give the plain answers at every size."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
from tests.docs import pages
from tests.helpers.examples import IS_THOROUGH

FOLDER = pages.DOCS / "recipes"
SIZES_OF_MORE_AXES = 20 if IS_THOROUGH else 5
SIZES = [(1, 1), (3, 57), (8, 33), *([(4, 64)] if IS_THOROUGH else [])]
ONE_BUCKET = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0)

Names = dict[str, Any]
Arguments = tuple[Any, ...]

needs_pages = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="a source distribution has no documentation"
)


class Recipe(NamedTuple):
    """What a page's `served` is tried with, beside what the page itself does.

    Attributes:
        passed: The names of what is passed through.
        inputs: The other arguments for two sizes.
        plain: The same answer without this package; `served`'s own function if None.
    """

    passed: tuple[str, ...]
    inputs: Callable[[np.random.Generator, int, int], Arguments]
    plain: Callable[..., Any] | None = None


def ids(random: np.random.Generator, rows: int, length: int) -> Arguments:
    """Token ids, none of them 0."""
    return (random.integers(1, 1000, (rows, length), np.int32),)


def ids_and_mask(random: np.random.Generator, rows: int, length: int) -> Arguments:
    """Token ids and a mask of ragged rows."""
    lengths = random.integers(1, length, rows, endpoint=True)
    mask = (np.arange(length) < lengths[:, None]).astype(np.float32)
    return *ids(random, rows, length), mask


def encoding(random: np.random.Generator, rows: int, length: int) -> Arguments:
    """What a tokenizer returns; no padding, whose hidden states nobody asks for."""
    tokens = ids(random, rows, length)[0]
    return ({"input_ids": tokens, "attention_mask": np.ones_like(tokens)},)


def utterances(random: np.random.Generator, rows: int, frames: int) -> Arguments:
    """Features, labels, and where either is padding; some rows have fewer frames."""
    real = random.integers(max(frames // 2, 1), frames, rows, endpoint=True)
    labels = random.integers(1, 32, (rows, 10), np.int32)
    given = random.integers(0, max(min(frames // 4, 10), 1), rows)
    return (
        random.standard_normal((rows, frames, 20), np.float32),
        (np.arange(frames) >= real[:, None]).astype(np.float32),
        labels,
        (np.arange(10) >= given[:, None]).astype(np.float32),
    )


def prompts(random: np.random.Generator, rows: int, length: int) -> Arguments:
    tokens = ids(random, rows, length)[0]
    return tokens, random.integers(1, length, rows, np.int32, endpoint=True)


RECIPES = {
    "plain": Recipe(("weights",), ids),
    "nnx": Recipe(("state",), ids_and_mask, lambda names, _, *inputs: names["classifier"](*inputs)),
    "linen": Recipe(("variables",), ids_and_mask),
    "equinox": Recipe(
        ("arrays",), ids, lambda names, _, ids: jax.vmap(jax.vmap(names["tagger"]))(ids)
    ),
    "haiku": Recipe(("params",), ids_and_mask),
    "keras": Recipe(
        ("trainable", "fixed"), ids, lambda names, _, __, ids: names["model"](ids, training=False)
    ),
    "huggingface": Recipe(
        ("model.params",),
        encoding,
        lambda names, params, encoding: names["model"](**encoding)["last_hidden_state"],
    ),
    "ctc": Recipe(("kernel",), utterances),
    "generation": Recipe(("params",), prompts),
}


def drawn(random: np.random.Generator, **largest: int) -> list[int]:
    """A size of each axis, up to the largest bucket."""
    return [int(random.integers(1, size, endpoint=True)) for size in largest.values()]


def pictures(random: np.random.Generator) -> Arguments:
    rows, height, width = drawn(random, batch=4, height=64, width=64)
    return (random.standard_normal((rows, height, width, 3), np.float32),)


def sentences(random: np.random.Generator) -> Arguments:
    rows, source, target = drawn(random, batch=4, src=32, tgt=16)
    return tuple(random.integers(0, 100, (rows, n), np.int32) for n in (source, target))


def hidden_states(random: np.random.Generator) -> Arguments:
    rows, length = drawn(random, batch=4, seq=32)
    return (random.standard_normal((rows, length, 16), np.float32),)


def structures(random: np.random.Generator) -> Arguments:
    rows, length = drawn(random, batch=2, seq=24)
    return tuple(
        random.standard_normal((rows, *(length,) * times, 8), np.float32) for times in (1, 2)
    )


def sounds(random: np.random.Generator) -> Arguments:
    return (random.standard_normal(drawn(random, batch=4, seq=256), np.float32),)


def left_padded(random: np.random.Generator) -> Arguments:
    rows, length = drawn(random, batch=4, seq=32)
    starts = random.integers(0, length, rows)
    mask = (np.arange(length) >= starts[:, None]).astype(np.int32)
    return random.integers(1, 1000, (rows, length), np.int32) * mask, mask


def graphs(random: np.random.Generator) -> Arguments:
    count, nodes, edges = drawn(random, batch=4, nodes=64, edges=256)
    return (
        random.standard_normal((nodes, 16), np.float32),
        *random.integers(0, nodes, (2, edges), np.int32),
        np.sort(random.integers(0, count, nodes, np.int32)),
        random.standard_normal((count, 16), np.float32),
    )


def all_real(function: str, **masks: int) -> Callable[..., Any]:
    """That function of a page, with masks of the first axes of its last argument, all True."""

    def plain(names: Names, params: Any, *inputs: np.ndarray) -> Any:
        real = {name: jnp.ones(inputs[0].shape[:axes], bool) for name, axes in masks.items()}
        return names[function](params, *inputs, **real)

    return plain


MORE_AXES: dict[str, tuple[Callable[..., Arguments], Callable[..., Any]]] = {
    "images": (pictures, all_real("network", mask=3)),
    "encoder_decoder": (sentences, all_real("transduce", source_mask=2)),
    "chain": (hidden_states, all_real("classify", mask=2)),
    "pairs": (structures, all_real("block", mask=2)),
    "audio": (sounds, all_real("encode", mask=2)),
    "left_padding": (left_padded, all_real("next_tokens")),
    "gnn": (graphs, all_real("network")),
}


@needs_pages
def test_every_recipe_is_tried():
    """Every page of the folder is in one of the tables above."""
    assert {path.stem for path in FOLDER.glob("*.md")} == {*RECIPES, *MORE_AXES, "index"}


@needs_pages
@pytest.mark.parametrize("name", [*RECIPES, *MORE_AXES])
def test_the_glue_is_under_ten_lines(name):
    """What a page adds to its model, warm-up included, is as short as the index says."""
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    found = re.search(r"^The glue:\n\n```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    assert "served.warmup(" in found[1]
    lines = [line for line in found[1].splitlines() if line.strip()]
    assert len(lines) < 10


@needs_pages
@pytest.mark.parametrize("name", MORE_AXES)
@pytest.mark.slow  # it warms up a grid, and the plain function is compiled for each size
def test_a_recipe_of_more_axes(name, tmp_path, monkeypatch):
    """It gives the plain answer at random sizes, and compiles nothing."""
    monkeypatch.chdir(tmp_path)
    names = pages.run(FOLDER / f"{name}.md")
    inputs, plain = MORE_AXES[name]
    random = np.random.default_rng(0)
    for _ in range(SIZES_OF_MORE_AXES):
        arguments = inputs(random)
        with no_compiles():
            found = names["served"](names["params"], *arguments)
        expected = jax.jit(partial(plain, names))(names["params"], *arguments)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
    assert names["served"].stats()["hits"] >= SIZES_OF_MORE_AXES


@needs_pages
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.slow  # another library is imported, and its model runs operation by operation
def test_a_recipe(name, tmp_path, monkeypatch):
    """A page prints what it says; ragged calls then compile nothing and give the plain answer."""
    monkeypatch.chdir(tmp_path)
    names = pages.run(FOLDER / f"{name}.md")
    recipe = RECIPES[name]
    served: BucketedFunction[..., Any] = names["served"]
    passed = [eval(part, names) for part in recipe.passed]
    plain = served.__wrapped__ if recipe.plain is None else partial(recipe.plain, names)
    random = np.random.default_rng(0)
    for rows, length in SIZES:
        if not served.manager.config.should_use_cudagraph(rows, length):
            continue
        inputs = recipe.inputs(random, rows, length)
        with no_compiles():
            found = served(*passed, *inputs)
        expected = jax.jit(plain)(*passed, *inputs)
        np.testing.assert_allclose(found, expected, 1e-5, 1e-5)
    assert served.stats()["hits"] > len(SIZES) // 2


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
