"""The decoders that the GPU benchmarks time; importing them starts no backend of JAX."""

from __future__ import annotations

from cudagraph_jax.demo.decoder.decoder_params import DecoderConfig

SIZES = {
    # For a look at the benchmark itself, on any machine.
    "tiny": DecoderConfig(dtype="bfloat16"),
    # Hidden size, heads and layers of Qwen2-0.5B and Llama-3.2-3B.
    "0.5b": DecoderConfig(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        dtype="bfloat16",
    ),
    "3b": DecoderConfig(
        vocab_size=128_256,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=28,
        num_heads=24,
        num_kv_heads=8,
        head_dim=128,
        dtype="bfloat16",
    ),
}
