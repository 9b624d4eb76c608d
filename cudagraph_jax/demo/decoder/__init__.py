"""A small Llama with random weights, served through `bucket_jit`: prefill, decode, KV cache."""

from cudagraph_jax.demo.decoder.decoder import Decoder

__all__ = ["Decoder"]
