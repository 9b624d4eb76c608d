"""The tensors of a model's folder, read into `Params`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cudagraph_jax.demo.bert.model import Architecture, Dense, Layer, Norm, Params
from cudagraph_jax.demo.bert.model_folder import SAVE_AGAIN, ModelFolder, Settings
from cudagraph_jax.demo.requirements import REINSTALL, DemoError, missing_dependency

if TYPE_CHECKING:
    from safetensors import safe_open

_TOKENS = "embeddings.word_embeddings"
_PREFIXES = ("", "bert.", "roberta.", "distilbert.")
_FLOATS = ("F32", "F16", "BF16", "F64")

# What the families call a block, and each of its parts.
_BERT = {
    "block": "encoder.layer",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_DISTILBERT = {
    "block": "transformer.layer",
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "intermediate": "ffn.lin1",
    "output": "ffn.lin2",
    "output_norm": "output_layer_norm",
}


def load_params(folder: ModelFolder) -> Params:
    """The weights as NumPy arrays in float32.

    Args:
        folder: Where they are and what shapes they must have.

    Raises:
        DemoError: A file is missing or broken or has another digest, a tensor is missing or has
            another shape, or safetensors is not installed.
    """
    if folder.sha256 is not None:
        _check_digest(folder.weights, folder.sha256)
    tensors = _Tensors.of(folder.weights)
    size = folder.architecture.hidden_size
    names = _DISTILBERT if folder.model_type == "distilbert" else _BERT
    return Params(
        tokens=tensors.take(f"{_TOKENS}.weight", folder.architecture.vocab_size, size),
        positions=_positions(tensors, folder),
        norm=tensors.norm("embeddings.LayerNorm", size),
        layers=tuple(
            _layer(tensors, f"{names['block']}.{index}", names, folder.architecture)
            for index in range(folder.architecture.layers)
        ),
        projections=tuple(_projections(folder)),
    )


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The tensors of a file, or of several with an index.

    Attributes:
        path: The file, for messages.
        files: By name of the tensors that they hold.
        prefix: Of the names, where the encoder was part of a larger model.
    """

    path: Path
    files: Mapping[str, safe_open]
    prefix: str

    @classmethod
    def of(cls, path: Path) -> _Tensors:
        """Those in a file of safetensors, or in all those of its index."""
        shards = [path]
        if path.suffix == ".json":
            listed = Settings.read(path).take("weight_map", dict)
            shards = [path.with_name(str(name)) for name in sorted(set(listed.values()))]
        files: dict[str, safe_open] = {}
        for shard in shards:
            file = _open(shard)
            files.update(dict.fromkeys(file.keys(), file))
        known = [prefix for prefix in _PREFIXES if f"{prefix}{_TOKENS}.weight" in files]
        return cls(path, files, known[0] if known else "")

    def take(self, name: str, *shape: int) -> npt.NDArray[np.float32]:
        """One of them, once its shape has been checked."""
        full = self.prefix + name
        if full not in self.files:
            some = ", ".join(sorted(self.files)[:3]) or "none at all"
            raise DemoError(
                f"{self.path} has no tensor {full!r} (but {some}, ...), expected one of the shape "
                f"{shape}: {SAVE_AGAIN}"
            )
        tensor = self.files[full].get_slice(full)
        found, kind = tuple(tensor.get_shape()), tensor.get_dtype()
        if found != shape or kind not in _FLOATS:
            raise DemoError(
                f"{self.path} has the tensor {full!r} with the shape {found} in {kind}, expected "
                f"{shape}, as config.json says, in {', '.join(_FLOATS)}: {SAVE_AGAIN}"
            )
        return np.asarray(self.files[full].get_tensor(full), np.float32)

    def dense(self, name: str, inputs: int, outputs: int, *, has_bias: bool = True) -> Dense:
        """An affine map; torch keeps its kernels as (out, in)."""
        kernel = np.ascontiguousarray(self.take(f"{name}.weight", outputs, inputs).T)
        bias = self.take(f"{name}.bias", outputs) if has_bias else np.zeros(outputs, np.float32)
        return Dense(kernel=kernel, bias=bias)

    def norm(self, name: str, size: int) -> Norm:
        """A layer normalisation."""
        return Norm(scale=self.take(f"{name}.weight", size), bias=self.take(f"{name}.bias", size))


def _open(path: Path) -> safe_open:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise missing_dependency("safetensors") from None
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise DemoError(f"{path} cannot be read ({error}): {SAVE_AGAIN}") from None


def _check_digest(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DemoError(
            f"the weights in {path} have sha256={found}, expected {sha256}: "
            f"reinstall them with {REINSTALL}"
        )


def _positions(tensors: _Tensors, folder: ModelFolder) -> npt.NDArray[np.float32]:
    """The table from the first token's row on, with the vector of type 0, which all tokens have."""
    size, first = folder.architecture.hidden_size, folder.first_position
    rows = first + folder.architecture.positions
    positions = tensors.take("embeddings.position_embeddings.weight", rows, size)[first:]
    if folder.token_types:
        name = "embeddings.token_type_embeddings.weight"
        positions = positions + tensors.take(name, folder.token_types, size)[0]
    return positions


def _projections(folder: ModelFolder) -> Iterator[Dense]:
    width = folder.architecture.pooled_size
    for path, projection in zip(folder.dense_weights, folder.architecture.projections, strict=True):
        tensors = _Tensors.of(path)
        yield tensors.dense("linear", width, projection.size, has_bias=projection.has_bias)
        width = projection.size


def _layer(
    tensors: _Tensors, prefix: str, names: Mapping[str, str], architecture: Architecture
) -> Layer:
    parts = {part: f"{prefix}.{name}" for part, name in names.items()}
    size, inner = architecture.hidden_size, architecture.intermediate_size
    return Layer(
        query=tensors.dense(parts["query"], size, size),
        key=tensors.dense(parts["key"], size, size),
        value=tensors.dense(parts["value"], size, size),
        attention_output=tensors.dense(parts["attention_output"], size, size),
        attention_norm=tensors.norm(parts["attention_norm"], size),
        intermediate=tensors.dense(parts["intermediate"], size, inner),
        output=tensors.dense(parts["output"], inner, size),
        output_norm=tensors.norm(parts["output_norm"], size),
    )
