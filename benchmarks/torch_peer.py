"""What PyTorch takes for the demo's decoder, eagerly and as a CUDA graph; gpu.py runs it.

    python benchmarks/torch_peer.py [--sizes 0.5b 3b] [--device cuda]
    python benchmarks/torch_peer.py --agree [--device cpu]

Prints one JSON document: milliseconds of a decode step and of a prefill or, with --agree, whether
the answers are the JAX model's. State is written in place: a graph that was captured once reads
what its last replay wrote. There is no torch.compile, which would be a contender of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

# Before JAX is imported: the GPU is PyTorch's here, JAX only gives sizes, and answers to compare.
os.environ["JAX_PLATFORMS"] = "cpu"

from sizes import SIZES

from cudagraph_jax.demo.decoder.decoder_params import (
    Array,
    DecoderConfig,
    DecoderParams,
    random_params,
)

try:
    import torch
    from torch import Tensor
    from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu
except ModuleNotFoundError as error:
    print(f"{error.name} is not installed: pip install torch", file=sys.stderr)
    raise SystemExit(2) from None

ROPE_THETA, NORM_EPS = 10_000.0, 1e-6  # as in decoder_model.py
WARM = 5  # runs before the first round
Work = Callable[[], None]


class Layer(NamedTuple):
    """One block. Kernels are (out, in); those that read the same input are one."""

    attention_norm: Tensor  # (hidden,)
    mlp_norm: Tensor  # (hidden,)
    qkv: Tensor  # ((heads + 2 kv_heads) head_dim, hidden)
    output: Tensor  # (hidden, heads head_dim)
    gate_up: Tensor  # (2 intermediate, hidden)
    down: Tensor  # (hidden, intermediate)


class Weights(NamedTuple):
    """All weights."""

    embedding: Tensor  # (vocab, hidden)
    layers: list[Layer]
    norm: Tensor  # (hidden,)
    head: Tensor  # (vocab, hidden)


def from_numpy(params: DecoderParams, device: str) -> Weights:
    """The weights of `random_params` in this model's layout."""

    def tensor(array: Array) -> Tensor:
        values = np.array(array, order="C")
        if values.dtype.name == "bfloat16":  # a type of ml_dtypes, which PyTorch doesn't know
            return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16).to(device)
        return torch.from_numpy(values).to(device)

    layers = []
    for of in params.layers:
        # Theirs lie (kv_heads, group + key + value); here all queries come first.
        parts = (of.qkv[:, :-2], of.qkv[:, -2], of.qkv[:, -1])
        qkv = torch.cat([tensor(part).reshape(-1, part.shape[-1]) for part in parts])
        output, gate_up = tensor(of.output).flatten(1), tensor(of.gate_up).flatten(0, 1)
        kernels = qkv, output, gate_up, tensor(of.down)
        layers.append(Layer(tensor(of.attention_norm), tensor(of.mlp_norm), *kernels))
    return Weights(tensor(params.embedding), layers, tensor(params.norm), tensor(params.head))


def random_weights(config: DecoderConfig, device: str) -> Weights:
    """Weights scaled as those of `random_params`; drawn on the device, which takes no minute."""
    ones = torch.ones(config.hidden_size, dtype=getattr(torch, config.dtype), device=device)

    def kernel(outputs: int, inputs: int) -> Tensor:
        return ones.new_empty(outputs, inputs).normal_(std=inputs**-0.5)

    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    shapes = (heads + 2 * kv_heads, hidden), (hidden, heads), (2 * inner, hidden), (hidden, inner)
    layers = [Layer(ones, ones, *(kernel(*s) for s in shapes)) for _ in range(config.num_layers)]
    head = kernel(config.vocab_size, hidden)
    return Weights(torch.randn_like(head), layers, ones, head)


class State:
    """Static buffers: a KV cache laid out as JAX's, what is read next, and the last logits."""

    def __init__(self, config: DecoderConfig, batch: int, context: int, device: str) -> None:
        shape = (2, config.num_layers, batch, config.num_kv_heads, context, config.head_dim)
        self.cache = torch.zeros(shape, dtype=getattr(torch, config.dtype), device=device)
        self.keys, self.values = (layers.unbind() for layers in self.cache)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.positions = torch.ones_like(self.tokens)
        self.logits = torch.zeros(batch, config.vocab_size, device=device)
        self.rows, self.places = (torch.arange(n, device=device) for n in (batch, context))
        half = torch.arange(config.head_dim // 2, device=device)
        angles = self.places[:, None, None] * ROPE_THETA ** -(half / len(half))
        # float32 (context, 1, head_dim); x is turned to x cos + swapped x sin.
        self.cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
        self.sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)


def greedy_step(weights: Weights, state: State) -> None:
    """Reads a token of each row."""
    cos, sin = state.cos[state.positions], state.sin[state.positions]
    unseen = state.places > state.positions[:, None, None, None]
    # What is added to the scores of all layers; SDPA would make it of a mask in each of them.
    bias = torch.zeros_like(unseen, dtype=state.cache.dtype).masked_fill_(unseen, -torch.inf)
    hidden = embedding(state.tokens, weights.embedding)
    for layer, keys, values in zip(weights.layers, state.keys, state.values, strict=True):
        query, key, value = _project(layer, hidden, cos, sin)
        keys[state.rows, :, state.positions] = key
        values[state.rows, :, state.positions] = value
        # Heads that share a key stand as its queries, since all see the same places: enable_gqa
        # with a mask leaves only the kernel that copies the cache for each of them.
        grouped = query.unflatten(1, (keys.shape[1], -1))
        attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=bias)
        _finish(layer, hidden, attended)
    _answer(weights, state, hidden, state.positions + 1)


def greedy_prefill(weights: Weights, state: State, tokens: Tensor, lengths: Tensor) -> None:
    """Reads prompts, (batch, seq), padded on the right."""
    seq = tokens.shape[1]
    cos, sin = state.cos[:seq], state.sin[:seq]
    hidden = embedding(tokens, weights.embedding)
    for layer, keys, values in zip(weights.layers, state.keys, state.values, strict=True):
        query, key, value = (x.transpose(1, 2) for x in _project(layer, hidden, cos, sin))
        keys[:, :, :seq] = key
        values[:, :, :seq] = value
        attended = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        _finish(layer, hidden, attended.transpose(1, 2))
    _answer(weights, state, hidden[state.rows, lengths - 1], lengths)


def _project(layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, (..., heads, head_dim)."""
    x = rms_norm(hidden, hidden.shape[-1:], layer.attention_norm, NORM_EPS)
    x = linear(x, layer.qkv).unflatten(-1, (-1, cos.shape[-1]))
    heads = layer.output.shape[1] // cos.shape[-1]
    turning, value = x.tensor_split(((x.shape[-2] + heads) // 2,), dim=-2)
    # cos and sin are float32, and so is the product.
    turned = torch.addcmul(turning * cos, turning.roll(cos.shape[-1] // 2, -1), sin)
    return *turned.to(value.dtype).tensor_split((heads,), dim=-2), value


def _finish(layer: Layer, hidden: Tensor, attended: Tensor) -> None:
    """Adds to `hidden`, in place, what follows the attention: its projection, and SwiGLU."""
    rows = hidden.view(-1, hidden.shape[-1])
    # addmm_ adds the residual in the kernel of the product.
    rows.addmm_(attended.reshape(len(rows), -1), layer.output.T)
    # In float32, rounded after the scale and not before: as in JAX while all scales are 1.
    x = rms_norm(rows, rows.shape[-1:], layer.mlp_norm, NORM_EPS)
    gate, up = linear(x, layer.gate_up).chunk(2, dim=-1)
    rows.addmm_(silu(gate) * up, layer.down.T)


def _answer(weights: Weights, state: State, hidden: Tensor, positions: Tensor) -> None:
    """The logits of hidden, (batch, hidden), and what is read next."""
    x = rms_norm(hidden, hidden.shape[-1:], weights.norm, NORM_EPS)
    # JAX keeps the float32 sums, `linear` rounds them to the dtype: only CUDA's mm has out_dtype.
    state.logits.copy_(linear(x, weights.head))
    torch.argmax(state.logits, dim=-1, out=state.tokens)
    state.positions.copy_(positions)


def ways(work: Work, device: str) -> dict[str, Work]:
    """`work` and, on a GPU, its graph: https://docs.pytorch.org/docs/stable/notes/cuda.html."""
    if device == "cpu":
        return {"torch": work}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return {"torch": work, "torch + CUDAGraph": graph.replay}


def timed(works: dict[str, Work], options: argparse.Namespace, steps: int) -> list[dict[str, Any]]:
    """Medians over rounds, each of them taken as `Steps.time` of decoding.py does."""
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    taken: dict[str, list[tuple[float, float]]] = {by: [] for by in works}
    for count in (WARM, *[steps] * options.rounds):
        for by, work in works.items():
            start = time.perf_counter()
            for _ in range(count):
                work()
            dispatched = time.perf_counter()
            wait()
            end = time.perf_counter()
            taken[by].append(((end - start) / count * 1e3, (dispatched - start) / count * 1e6))
    medians = {by: map(statistics.median, zip(*taken[by][1:], strict=True)) for by in works}
    return [{"by": by, "ms": ms, "host_us": us} for by, (ms, us) in medians.items()]


def rows(size: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A decode step of each batch, and a prefill of one prompt, whose tokens are on the device."""
    config, device, seq = SIZES[size], options.device, options.prompt
    weights = random_weights(config, device)
    for batch in options.batches:
        # One state for both ways: what a step takes does not depend on what is in it.
        state = State(config, batch, options.context, device)
        steps = ways(partial(greedy_step, weights, state), device)
        state.tokens.zero_()  # the capture's warm-up moved on
        state.positions.fill_(1)
        for row in timed(steps, options, options.steps):
            yield {"size": size, "what": f"decode, batch {batch}", **row}
        del state, steps  # before the next ones are allocated
    state = State(config, 1, seq, device)
    tokens = torch.zeros(1, seq, dtype=torch.int32, device=device)
    lengths = torch.full((1,), seq, device=device)
    prefills = ways(partial(greedy_prefill, weights, state, tokens, lengths), device)
    for row in timed(prefills, options, 1):
        yield {"size": size, "what": f"prefill of {seq}", **row}


def agreement(device: str, steps: int = 20) -> dict[str, Any]:
    """Greedy tokens (batch, 1 + steps) of both in float32, and the logits' largest difference."""
    import jax

    from cudagraph_jax.demo.decoder.transformer import decode_step, prefill

    params = random_params(config := DecoderConfig())
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(3, 12), dtype=np.int32)
    lengths = np.array((12, 7, 1), np.int32)
    cache, logits = prefill(params, tokens, lengths)
    cache = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 0), (0, steps), (0, 0))), cache)
    step, wanted = jax.jit(decode_step), [logits]
    for number in range(steps):
        cache, logits = step(params, cache, wanted[-1].argmax(-1), lengths + number)
        wanted.append(logits)
    expected = np.stack(wanted)
    found: dict[str, Any] = {"jax": expected.argmax(-1).T.tolist(), "agree": True}
    weights, state = from_numpy(params, device), State(config, 3, 12 + steps, device)
    prompt = (torch.from_numpy(array).to(device) for array in (tokens, lengths))
    prefills = ways(partial(greedy_prefill, weights, state, *prompt), device)
    for by, work in ways(partial(greedy_step, weights, state), device).items():
        answers = []
        for read in (prefills[by], *[work] * steps):
            read()
            answers.append((state.logits.tolist(), state.tokens.tolist()))
        got, chosen = (np.array(parts) for parts in zip(*answers, strict=True))
        off = float(np.abs(got - expected).max() / np.abs(expected).max())
        found[by] = {"tokens": chosen.T.tolist(), "logits_off": off}
        found["agree"] &= off <= 1e-4 and found[by]["tokens"] == found["jax"]
    return found


def main() -> int:
    """Prints the document; 1 where the answers differ, 2 without the GPU that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.5b", "3b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    for name, default in {"context": 1024, "prompt": 512, "rounds": 7, "steps": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--agree", action="store_true")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU: take --device cpu, or a CUDA wheel of torch")
    if (last := 2 * (WARM + options.rounds * options.steps)) >= options.context:
        parser.error(f"--context {options.context} is too short: two ways take {last} steps")
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    graphs = "captured" if on_gpu else "left out: a CPU has none"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    found: dict[str, Any] = {"versions": versions, "device": name, "cudagraph": graphs}
    measured = (row for size in options.sizes for row in rows(size, options))
    with torch.inference_mode():
        found |= agreement(options.device) if options.agree else {"rows": list(measured)}
    print(json.dumps(found, indent=1))
    return 0 if found.get("agree", True) else 1


if __name__ == "__main__":
    sys.exit(main())
