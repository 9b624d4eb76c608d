"""The decoder's two functions, on small weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cudagraph_jax import ConfigError
from cudagraph_jax.demo.decoder.decoder_params import DecoderConfig, param_shapes, random_params
from cudagraph_jax.demo.decoder.transformer import NORM_EPS, ROPE_THETA, decode_step, prefill

SIZES = DecoderConfig(vocab_size=19, hidden_size=12, intermediate_size=16, head_dim=4)
PARAMS = random_params(SIZES)
SEQ = 6
CLOSE = 1e-5
compiled_prefill = jax.jit(prefill)
compiled_step = jax.jit(decode_step)
rows_strategy = st.lists(st.integers(0, SIZES.vocab_size - 1), min_size=1, max_size=SEQ)


def norm(scale, x):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + NORM_EPS) * scale


def rotated(x, place):
    """One head's vector as complex numbers, each turned by its angle."""
    half = x.shape[-1] // 2
    angles = place * ROPE_THETA ** -(np.arange(half) / half)
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag])


def attended(layer, x):
    """Head by head and place by place, in loops."""
    out = np.zeros_like(x)
    kv_heads, group, width, _ = np.subtract(layer.qkv.shape, (0, 2, 0, 0))
    output = layer.output.reshape(-1, kv_heads, group, width)
    for k, g in np.ndindex(kv_heads, group):
        queries = [rotated(layer.qkv[k, g] @ row, t) for t, row in enumerate(x)]
        keys = [rotated(layer.qkv[k, -2] @ row, t) for t, row in enumerate(x)]
        values = x @ layer.qkv[k, -1].T
        for t, query in enumerate(queries):
            weights = np.exp([query @ key / len(key) ** 0.5 for key in keys[: t + 1]])
            out[t] += (weights / weights.sum()) @ values[: t + 1] @ output[:, k, g].T
    return out


def logits_of(tokens):
    """The last token's logits, by the formulas of the papers, in NumPy and float64."""
    params = jax.tree.map(lambda array: array.astype(np.float64), PARAMS)
    hidden = params.embedding[tokens]
    for layer in params.layers:
        hidden = hidden + attended(layer, norm(layer.attention_norm, hidden))
        x = norm(layer.mlp_norm, hidden)
        gate, up = x @ layer.gate_up[0].T, x @ layer.gate_up[1].T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ layer.down.T
    return params.head @ norm(params.norm, hidden[-1])


def padded(tokens, filler=0):
    return np.array([tokens + [filler] * (SEQ - len(tokens))], np.int32)


def test_the_model_is_the_papers():
    """Prefill gives what a plain NumPy transcription gives."""
    tokens = [3, 1, 4, 1, 5, 9]
    _, logits = compiled_prefill(PARAMS, padded(tokens), np.array([SEQ], np.int32))
    np.testing.assert_allclose(logits[0], logits_of(tokens), CLOSE, CLOSE)


@given(rows_strategy, st.integers(-(2**31), 2**31 - 1))
def test_padding_does_not_leak(tokens, filler):
    """What stands in the padded places does not matter, be it no token at all."""
    lengths = np.array([len(tokens)], np.int32)
    _, logits = compiled_prefill(PARAMS, padded(tokens, filler), lengths)
    np.testing.assert_array_equal(logits, compiled_prefill(PARAMS, padded(tokens), lengths)[1])
    np.testing.assert_allclose(logits[0], logits_of(tokens), CLOSE, CLOSE)


@given(rows_strategy, st.data())
@settings(max_examples=40)
def test_a_step_equals_a_longer_prefill(tokens, data):
    """Reading a prompt's rest token by token gives the logits of the whole prompt."""
    read = data.draw(st.integers(1, len(tokens)))
    cache, logits = compiled_prefill(PARAMS, padded(tokens[:read]), np.array([read], np.int32))
    for position in range(read, len(tokens)):
        cache, logits = compiled_step(
            PARAMS, cache, np.array([tokens[position]], np.int32), np.array([position], np.int32)
        )
    np.testing.assert_allclose(logits[0], logits_of(tokens), CLOSE, CLOSE)


def test_a_row_of_padding_is_finite():
    """A row of length 0, as batch padding is, gives numbers that are not NaN."""
    _, logits = compiled_prefill(PARAMS, padded([1]), np.array([0], np.int32))
    assert np.isfinite(logits).all()


def test_bfloat16_everywhere():
    """In bfloat16 weights and cache are bfloat16, and logits near those of float32."""
    params = random_params(
        DecoderConfig(
            vocab_size=19, hidden_size=12, intermediate_size=16, head_dim=4, dtype="bfloat16"
        )
    )
    assert {array.dtype for array in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    lengths = np.array([4], np.int32)
    cache, _ = compiled_prefill(params, padded([3, 1, 4, 1]), lengths)
    cache, logits = compiled_step(params, cache, np.array([5], np.int32), lengths)
    assert {array.dtype for array in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[0], logits_of([3, 1, 4, 1, 5]), atol=0.1)


def test_a_seed_is_a_model():
    """One seed gives the same weights again, another one gives others."""
    again, other = random_params(SIZES), random_params(SIZES, seed=1)
    np.testing.assert_array_equal(again.head, PARAMS.head)
    assert not np.array_equal(other.head, PARAMS.head)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "num_layers=0 is below 1: give a size of 1 or more"),
        ({"head_dim": 7}, "head_dim=7 is odd: rotary positions turn pairs"),
        ({"num_kv_heads": 3}, "num_heads=4 is no multiple of num_kv_heads=3"),
        ({"dtype": "float"}, "dtype='float' is unknown: did you mean 'float32'?"),
    ],
)
def test_sizes_that_cannot_be(fields, message):
    """A configuration that no model has is refused with the reason."""
    with pytest.raises(ConfigError) as caught:
        DecoderConfig(**fields)
    assert str(caught.value).startswith(message)


def test_shapes_without_weights():
    """The shapes are those of the weights, and take no time to make up."""
    config = DecoderConfig(num_layers=2, dtype="bfloat16")
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), param_shapes(config))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), random_params(config))
    billions = param_shapes(DecoderConfig(hidden_size=2**14, num_heads=128, head_dim=128))
    assert billions.layers[0].output.shape == (2**14, 2**14)
