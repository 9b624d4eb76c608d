"""The decoder's sizes and weights: a configuration, a pytree, and random values for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax._base.checks import positive_size, require_choice
from cudagraph_jax.errors import ConfigError

DType = Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")

Array = jax.Array | np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The sizes of a decoder; the defaults are small enough to compile often.

    Args:
        vocab_size: Tokens that it knows.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the feed-forward part.
        num_layers: Transformer blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads, each shared by `num_heads / num_kv_heads` query heads.
        head_dim: Width of a head; even, since rotary positions turn pairs.
        dtype: What weights, activations and KV cache are held in.

    Raises:
        ConfigError: A size below 1, an odd `head_dim`, heads that cannot be shared evenly, or
            another dtype.
    """

    vocab_size: int = 128
    hidden_size: int = 32
    intermediate_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        for name in self.__slots__:
            if name != "dtype":
                positive_size(getattr(self, name), name=name)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd: rotary positions turn pairs")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}"
            )


class DecoderLayer(NamedTuple):
    """One block. Kernels are (out, in), and those that read the same input are one.

    `qkv` carries the heads in its shape, so that the model needs no sizes. Query heads are grouped
    by the key head that they share: for each of these there are `group` queries, key and value.
    """

    attention_norm: Array  # (hidden,)
    qkv: Array  # (kv_heads, group + 2, head_dim, hidden)
    output: Array  # (hidden, heads * head_dim)
    mlp_norm: Array  # (hidden,)
    gate_up: Array  # (2, intermediate, hidden)
    down: Array  # (hidden, intermediate)


class DecoderParams(NamedTuple):
    """All weights."""

    embedding: Array  # (vocab, hidden)
    layers: tuple[DecoderLayer, ...]
    norm: Array  # (hidden,)
    head: Array  # (vocab, hidden)


def random_params(config: DecoderConfig, *, seed: int = 0) -> DecoderParams:
    """Random weights as NumPy arrays: the same for the same sizes and seed, whatever the dtype.

    Each kernel is scaled by the square root of its inputs, so that activations keep their size.

    Args:
        config: The sizes.
        seed: The seed of NumPy's generator.
    """
    random = np.random.default_rng(seed)
    dtype = jnp.dtype(config.dtype)

    def kernel(*shape: int, inputs: int) -> np.ndarray:
        values = random.standard_normal(shape, np.float32)
        values *= inputs**-0.5
        return values.astype(dtype, copy=False)

    return _params(config, kernel, scale=np.ones(config.hidden_size, dtype))


def param_shapes(config: DecoderConfig) -> DecoderParams:
    """The same pytree without the numbers, of `jax.ShapeDtypeStruct`."""
    dtype = jnp.dtype(config.dtype)

    def kernel(*shape: int, inputs: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    return _params(config, kernel, scale=jax.ShapeDtypeStruct((config.hidden_size,), dtype))


def _params(config: DecoderConfig, kernel: Callable[..., Any], *, scale: Any) -> DecoderParams:
    """The pytree, of what `kernel(*shape, inputs=…)` gives."""
    hidden, kv_heads, width = config.hidden_size, config.num_kv_heads, config.head_dim
    group, inner = config.num_heads // kv_heads, config.intermediate_size
    heads = config.num_heads * width

    def layer() -> DecoderLayer:
        return DecoderLayer(
            attention_norm=scale,
            qkv=kernel(kv_heads, group + 2, width, hidden, inputs=hidden),
            output=kernel(hidden, heads, inputs=heads),
            mlp_norm=scale,
            gate_up=kernel(2, inner, hidden, inputs=hidden),
            down=kernel(hidden, inner, inputs=inner),
        )

    return DecoderParams(
        embedding=kernel(config.vocab_size, hidden, inputs=1),
        layers=tuple(layer() for _ in range(config.num_layers)),
        norm=scale,
        head=kernel(config.vocab_size, hidden, inputs=hidden),
    )
