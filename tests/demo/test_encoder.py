"""The encoder: embeddings of real text by the real model."""

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest

from cudagraph_jax import (
    BucketedFunction,
    ConfigError,
    CUDAGraphConfig,
    GraphStore,
    InputShapeError,
    bucket_jit,
)
from cudagraph_jax.demo import Encoder
from cudagraph_jax.demo.bert import model
from cudagraph_jax.demo.bert.model import encode
from cudagraph_jax.demo.bert.tokens import stack
from cudagraph_jax.demo.encoder import default_config, model_fingerprint
from cudagraph_jax.testing import assert_no_compiles, assert_packing_preserves
from tests.helpers.examples import as_a_whole

# The first numbers of the vectors that sentence-transformers gives for these texts, one of which is
# cut off after 256 tokens: made by tests/helpers/programs/sentence_vectors.py.
VECTORS = json.loads(Path(__file__).with_name("sentence_vectors.json").read_text())
PACKAGED: dict[str, list[float]] = VECTORS["all-MiniLM-L6-v2"]
RAGGED = ["a", "Sort an array.", "Return the eigenvalues of a matrix " * 6, "x " * 40, "", "b c"]


def test_sentence_transformers_gives_the_same_for_the_package(encoder):
    """The embeddings are those of the original, texts beyond the model's limit included."""
    vectors = encoder.embed(list(PACKAGED))
    np.testing.assert_allclose(vectors[:, :16], list(PACKAGED.values()), atol=1e-6)
    assert encoder.name == "all-MiniLM-L6-v2"
    assert (encoder.max_tokens, encoder.embedding_size, encoder.vocab_size) == (256, 384, 30522)


def test_known_cosine(encoder):
    """Two sentences have the cosine that is published for them."""
    first, second = encoder.embed(list(PACKAGED)[:2])
    assert float(first @ second) == pytest.approx(0.2041, abs=5e-5)


def test_unit_length(encoder):
    """Every text has a float32 vector of length one, the empty text too."""
    vectors = encoder.embed(RAGGED)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(RAGGED), 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_embed_equals_the_function(encoder):
    """Batched and padded, the vectors are those of the plain function."""
    plain = as_a_whole(encode)(encoder.params, *stack(encoder.tokenize(RAGGED)))
    np.testing.assert_allclose(encoder.embed(RAGGED), plain, atol=1e-5)


def test_order_does_not_matter(encoder):
    """A text's vector depends neither on its place nor on its neighbours."""
    forwards, backwards = encoder.embed(RAGGED), encoder.embed(RAGGED[::-1])
    np.testing.assert_allclose(forwards, backwards[::-1], atol=1e-5)


def test_truncated(encoder):
    """What comes after the model's limit changes nothing."""
    long, longer = encoder.embed(["word " * 254, "word " * 254 + "and something else"])
    np.testing.assert_allclose(long, longer, atol=1e-6)


def test_nothing_to_embed(encoder):
    """No texts give no vectors."""
    vectors = encoder.embed([])
    assert vectors.shape == (0, 384)
    assert vectors.dtype == np.float32


@pytest.mark.parametrize("texts", ["a single text", b"bytes"])
def test_single_text(encoder, texts):
    """A string is not taken for a sequence of letters."""
    with pytest.raises(InputShapeError, match=r"expected a sequence of str: wrap it in a list"):
        encoder.embed(texts)


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", ["nested"]])
def test_no_text(encoder, wrong):
    """What is no string is told by its place."""
    with pytest.raises(InputShapeError, match=r"texts\[1\]=.* expected str"):
        encoder.embed(["fine", wrong])


def test_any_iterable(encoder):
    """A generator of texts will do."""
    found, expected = encoder.embed(iter(["a", "b"])), encoder.embed(("a", "b"))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_warmup_captures_the_grid(encoder, config):
    """After warm-up no text compiles anything."""
    steps = []
    report = encoder.warmup(progress=lambda done, total, item: steps.append((done, total)))
    assert {record.bucket for record in report.buckets} == set(config.buckets())
    assert steps
    with assert_no_compiles():
        encoder.embed(RAGGED)
    assert isinstance(encoder.function, BucketedFunction)


def test_limits_of_the_config():
    """A disabled configuration embeds the same, eagerly, in batches of its largest size."""
    encoder = Encoder(CUDAGraphConfig(enabled=False, capture_sizes=(2,)))
    text, expected = next(iter(PACKAGED.items()))
    vectors = encoder.embed([text] * 4)  # by two calls of the same operations
    np.testing.assert_allclose(vectors[:, :16], [expected] * 4, atol=1e-6)
    assert encoder.function.stats()["eager_calls"] == 2


def test_default_config():
    """The grid covers every text, and a CPU is run once."""
    for packing, buckets in ((False, 36), (True, 12)):
        config = default_config(packing=packing)
        assert config.max_seq_len == 256
        assert len(config.buckets()) == buckets
        assert max(config.capture_sizes) == 16
    assert (config.warmup_iterations == 2) == (jax.default_backend() == "cpu")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("limit", [1, 16, 128, 256, 300, 384, 512, 4096])
def test_default_config_of_other_limits(limit, packing):
    """Lengths are the demo's below the limit, end at the limit, and leave no large gaps above."""
    lengths = default_config(max_tokens=limit, packing=packing).capture_seq_lens or ()
    usual = default_config(packing=packing).capture_seq_lens or ()
    below = [length for length in usual if length < limit]
    assert lengths[-1] == limit
    assert list(lengths[: len(below)]) == below
    above = [length for length in lengths if length >= 256]
    assert all(after <= before * (2 if packing else 1.26) for before, after in pairwise(above))


def test_fingerprint_is_of_the_code_and_the_architecture():
    """A store knows the model by all of its source, which is one module, and by its facts."""
    source = Path(model.__file__).read_bytes() + repr(model.MINILM).encode()
    assert model_fingerprint() == f"bert {hashlib.sha256(source).hexdigest()}"
    modules = {getattr(value, "__module__", None) for value in vars(model).values()}
    assert {name for name in modules if str(name).startswith("cudagraph_jax")} == {model.__name__}
    assert all(field.repr for field in dataclasses.fields(model.Architecture))


def test_weights_are_arguments(tiny_params, tmp_path):
    """What is stored holds no weights: the same executable serves others, without tracing."""
    config = CUDAGraphConfig(capture_sizes=(2,), capture_seq_lens=(8,), warmup_iterations=0)
    arguments = (np.ones((2, 8), np.int32), np.ones((2, 8), np.int32))
    traced = []

    def served(params, ids, mask):
        traced.append(ids.shape)
        return encode(params, ids, mask)

    others = jax.tree.map(lambda leaf: leaf[::-1], tiny_params)
    for params, is_traced in [(tiny_params, True), (others, False)]:
        traced.clear()
        function = bucket_jit(
            served,
            in_axes=(None, "batch seq", "batch seq"),
            config=config,
            store=tmp_path / "store",
            fingerprint=model_fingerprint(),
        )
        function.warmup(params, *arguments, progress=False)
        assert bool(traced) == is_traced
        expected = as_a_whole(encode)(params, *arguments)
        np.testing.assert_allclose(function(params, *arguments), expected, atol=1e-5)
    assert not jax.make_jaxpr(encode)(tiny_params, *arguments).consts


def test_stores(tmp_path):
    """A store is a path or a `GraphStore`; a second one in the configuration is refused."""
    config = CUDAGraphConfig(capture_sizes=(2,), store=str(tmp_path))
    named = Encoder(config).function.manager.store
    assert named is not None
    assert named.path == tmp_path
    store = GraphStore(tmp_path)
    assert Encoder(store=store).function.manager.store is store
    with pytest.raises(ConfigError, match="give one of the two"):
        Encoder(config, store=store)


def test_single_texts_through_the_batcher(encoder):
    """The encoder's batcher gives each text the vector that `embed` gives it."""
    texts = ["sort", "Compute the eigenvalues of a matrix.", "an array of ones", "word " * 40]
    expected = encoder.embed(texts)
    encoder.warmup(progress=False)
    found = encoder.batcher.map(map(encoder.item, encoder.tokenize(texts)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def packer():
    """An encoder of rows that short texts share."""
    grid = CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(64, 256), warmup_iterations=0)
    return Encoder(grid, packing=True)


def test_packed_texts_get_the_same_vectors(encoder, packer):
    """Texts that share rows get the vectors that they get alone, warm or not, in their order."""
    texts = [*RAGGED, "word " * 400, *["an array of ones", "sort"] * 8]
    different = list(dict.fromkeys(texts))
    alone = dict(zip(different, encoder.embed(different), strict=True))
    expected = np.stack([alone[text] for text in texts])
    np.testing.assert_allclose(packer.embed(texts), expected, atol=1e-5)
    packer.warmup(progress=False)
    with assert_no_compiles():
        np.testing.assert_allclose(packer.embed(texts), expected, atol=1e-5)
    stats = packer.batcher.stats()
    assert 0 < stats["items"]["answered"] < len(texts) / 2
    assert stats["real_elements"] == sum(map(len, packer.tokenize(texts)))
    assert packer.embed([]).shape == (0, 384)


def test_a_micro_batch_of_a_packing_encoder(encoder, packer):
    """`serve` gives each row of a micro-batch its vector, packing or not; so does an item."""
    rows = packer.tokenize(RAGGED[:3])
    expected = encoder.serve(*stack(rows))
    np.testing.assert_allclose(packer.serve(*stack(rows)), expected, atol=1e-5)
    packer.warmup(progress=False)
    answers = packer.batcher.map(map(packer.item, rows))
    np.testing.assert_allclose([answer[0] for answer in answers], expected, atol=1e-5)


def test_packing_preserves_the_tiny_model(tiny_params):
    """No text of a packed row sees another, whatever shares it."""
    assert_packing_preserves(
        as_a_whole(partial(model.encode_packed, tiny_params)),
        vocabulary=50,
        max_segments=model.MAX_SEGMENTS,
    )


def test_both_ways_share_a_store(tmp_path, tiny_params):
    """What is stored of the one is not loaded for the other, although one module holds both."""
    grid = CUDAGraphConfig(capture_sizes=(1,), capture_seq_lens=(32,), warmup_iterations=0)
    for packing in (False, True):
        made = Encoder(grid, store=tmp_path, packing=packing)
        made.params = tiny_params
        assert made.params is tiny_params
        assert made.warmup(progress=False).captured == 1


def test_embed_shares_calls_once_all_is_captured(encoder):
    """Warm, texts of several threads go through the one batcher; each is counted there."""
    encoder.warmup(progress=False)
    before = encoder.batcher.stats()["items"]["answered"]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(encoder.embed, [RAGGED] * 4))
    np.testing.assert_allclose(found, [found[0]] * 4, atol=1e-5)
    assert encoder.batcher.stats()["items"]["answered"] == before + 4 * len(RAGGED)


def test_what_embed_asks_stays_what_it_was_warm_or_not(tiny_params):
    """Warm, texts longer than a new grid are still answered, and by other weights."""
    grid = CUDAGraphConfig(capture_sizes=(1, 2), capture_seq_lens=(4, 8), warmup_iterations=1)
    made = Encoder(grid)
    made.params = tiny_params
    texts = ["sort an array", "word " * 20, "an array"]
    cold = made.embed(texts)
    made.warmup(progress=False)
    np.testing.assert_allclose(made.embed(texts[::2]), cold[::2], atol=1e-5)
    assert made.batcher.stats()["items"]["answered"] == 2
    made.batcher.replan(max_graphs=2, headroom=5)
    made.params = jax.tree.map(lambda leaf: leaf * 0.5, made.params)
    other = made.embed(texts)
    assert made.batcher.stats()["items"]["answered"] == 4
    plain = as_a_whole(encode)(made.params, *stack(made.tokenize(texts)))
    np.testing.assert_allclose(other, plain, atol=1e-5)
    assert np.abs(other - cold).max() > 1e-3
