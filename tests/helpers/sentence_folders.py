"""Folders as sentence-transformers saves them, of tiny encoders with random weights."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401, bfloat16 for safetensors
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

HIDDEN, INNER, LAYERS, HEADS, POSITIONS, LIMIT = 32, 48, 2, 4, 24, 20
WORDS = 90
TEXTS = ("w1 W2 w3", "w7", " ".join(f"w{number % WORDS}" for number in range(3, 90, 5)) + " w8 w9")
"""One of them is longer than all limits."""

# Parts of a block, and the shapes of their weights.
_BERT = {
    "attention.self.query": (HIDDEN, HIDDEN),
    "attention.self.key": (HIDDEN, HIDDEN),
    "attention.self.value": (HIDDEN, HIDDEN),
    "attention.output.dense": (HIDDEN, HIDDEN),
    "attention.output.LayerNorm": (HIDDEN,),
    "intermediate.dense": (INNER, HIDDEN),
    "output.dense": (HIDDEN, INNER),
    "output.LayerNorm": (HIDDEN,),
}
_DISTIL = {
    "attention.q_lin": (HIDDEN, HIDDEN),
    "attention.k_lin": (HIDDEN, HIDDEN),
    "attention.v_lin": (HIDDEN, HIDDEN),
    "attention.out_lin": (HIDDEN, HIDDEN),
    "sa_layer_norm": (HIDDEN,),
    "ffn.lin1": (INNER, HIDDEN),
    "ffn.lin2": (HIDDEN, INNER),
    "output_layer_norm": (HIDDEN,),
}

TANH = "torch.nn.modules.activation.Tanh"
IDENTITY = "torch.nn.modules.linear.Identity"
CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "not normalised": {"is_normalised": False},
    **{
        mode: {"pooling": [mode], "is_normalised": False}
        for mode in ("cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    },
    "cls and mean": {"pooling": ["cls", "mean"], "is_normalised": False},
    "old keys": {"pooling": ["mean", "max"], "is_old": True},
    **{
        activation: {"activation": activation, "is_normalised": False}
        for activation in ("gelu_new", "gelu_pytorch_tanh", "relu", "silu")
    },
    "roberta": {"family": "roberta", "prefix": "roberta.", "is_normalised": False},
    "xlm-roberta": {"family": "xlm-roberta", "limit": None},
    "camembert": {"family": "camembert", "limit": POSITIONS},
    "distilbert": {"family": "distilbert", "is_normalised": False},
    "distilbert with a head": {"family": "distilbert", "prefix": "distilbert."},
    "tanh": {"dense": [(8, TANH, True)], "is_normalised": False},
    "two dense": {"dense": [(40, TANH, False), (8, IDENTITY, True)], "pooling": ["cls", "mean"]},
    "float16": {"kind": "float16", "prefix": "bert."},
    "bfloat16": {"kind": "bfloat16", "is_old": True},
    "shards": {"shards": 3},
    "prompt": {"prompt": "w5 w6 ", "is_normalised": False},
    "lower case": {"is_lower_cased": True},
}
"""What `write` gets."""


def write(
    folder: Path,
    *,
    family="bert",
    prefix="",
    activation="gelu",
    pooling=("mean",),
    dense=(),
    is_normalised=True,
    kind="float32",
    shards=1,
    limit=LIMIT,
    prompt="",
    is_lower_cased=False,
    is_old=False,
) -> Path:
    """Writes a folder of the same random weights for the same arguments.

    Args:
        folder: Where it goes.
        family: `model_type` of its configuration.
        prefix: Of its tensors' names.
        activation: Of its blocks.
        pooling: Modes.
        dense: Sizes, activations and whether there is a bias, of dense modules.
        is_normalised: Whether the last module normalises.
        kind: Of its tensors.
        shards: In how many files they lie.
        limit: Tokens of a text; None: what the positions allow.
        prompt: The default one.
        is_lower_cased: By its own configuration, and not by the tokenizer.
        is_old: With folders, names and keys as in versions before 5.
    """
    transformer = folder / "0_Transformer" if is_old else folder
    transformer.mkdir(parents=True)
    draw = _Draw(kind)
    _write_modules(folder, pooling, dense, is_normalised, is_old, draw)
    first = 2 if family in ("roberta", "xlm-roberta", "camembert") else 0
    tensors = _tensors(family, prefix, first, draw)
    _write_tensors(transformer, tensors, shards)
    _write_json(transformer / "config.json", _config(family, activation, first))
    own = {"do_lower_case": is_lower_cased} | ({"max_seq_length": limit} if is_old else {})
    _write_json(transformer / "sentence_bert_config.json", own)
    _write_tokenizer(transformer, first, limit, not is_lower_cased)
    prompts = {"query": "w1", "passage": prompt}
    default = "passage" if prompt else None
    _write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": default},
    )
    return folder


class _Draw:
    def __init__(self, kind):
        self.kind = kind
        # Of all generators this one's numbers are promised to stay as they are.
        self.random = np.random.RandomState(0)

    def __call__(self, *shape):
        return (self.random.randn(*shape) * 0.3).astype(self.kind)

    def norm(self, name):
        return {f"{name}.weight": self(HIDDEN) + 1, f"{name}.bias": self(HIDDEN)}


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_modules(folder, pooling, dense, is_normalised, is_old, draw):
    modules = ["transformer.Transformer", "pooling.Pooling", *["dense.Dense"] * len(dense)]
    modules += ["normalize.Normalize"] * is_normalised
    listed = []
    for index, module in enumerate(modules):
        place, kind = module.split(".")
        where = "models" if is_old else f"base.modules.{place}"
        if kind == "Pooling" and not is_old:
            where = "sentence_transformer.modules.pooling"
        path = f"{index}_{kind}" if index or is_old else ""
        listed.append({"name": str(index), "path": path})
        listed[-1]["type"] = f"sentence_transformers.{where}.{kind}"
        (folder / path).mkdir(exist_ok=True)
    _write_json(folder / "modules.json", listed)
    _write_json(folder / "1_Pooling/config.json", _pooling_config(pooling, is_old))
    width = HIDDEN * len(pooling)
    for index, (size, activation, bias) in enumerate(dense, start=2):
        place = folder / f"{index}_Dense"
        config = {"in_features": width, "out_features": size, "bias": bias}
        _write_json(place / "config.json", {**config, "activation_function": activation})
        tensors = {"linear.weight": draw(size, width)}
        if bias:
            tensors["linear.bias"] = draw(size)
        save_file(tensors, place / "model.safetensors")
        width = size


def _pooling_config(modes, is_old):
    if not is_old:
        return {"embedding_dimension": HIDDEN, "pooling_mode": list(modes)}
    keys = ("cls_token", "max_tokens", "mean_tokens")
    on = {f"pooling_mode_{key}": key.partition("_")[0] in modes for key in keys}
    return {"word_embedding_dimension": HIDDEN, **on}


def _config(family, activation, first):
    config = {
        "model_type": family,
        "vocab_size": WORDS + 5,
        "max_position_embeddings": first + POSITIONS,
    }
    if family == "distilbert":
        sizes = {"dim": HIDDEN, "hidden_dim": INNER, "n_layers": LAYERS, "n_heads": HEADS}
        return {**config, **sizes, "activation": activation}
    return {
        **config,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5 if first else 1e-12,
        "pad_token_id": first // 2,
        "type_vocab_size": 1 if first else 2,
    }


def _tensors(family, prefix, first, draw):
    is_distilbert = family == "distilbert"
    rows = {"word": WORDS + 5, "position": first + POSITIONS, "token_type": 1 if first else 2}
    if is_distilbert:
        del rows["token_type"]
    tensors = {
        f"embeddings.{name}_embeddings.weight": draw(count, HIDDEN) for name, count in rows.items()
    }
    tensors |= draw.norm("embeddings.LayerNorm")
    name, parts = ("transformer", _DISTIL) if is_distilbert else ("encoder", _BERT)
    for layer in range(LAYERS):
        for part, shape in parts.items():
            full = f"{name}.layer.{layer}.{part}"
            if len(shape) == 1:
                tensors |= draw.norm(full)
            else:
                tensors |= {f"{full}.weight": draw(*shape), f"{full}.bias": draw(shape[0])}
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _write_tensors(folder, tensors, shards):
    if shards == 1:
        # As a checkpoint has them, some tensors are no part of the encoder.
        save_file(tensors | {"cls.bias": np.zeros(3, np.int64)}, folder / "model.safetensors")
        return
    files = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    for index, file in enumerate(files):
        names = list(tensors)[index::shards]
        save_file({name: tensors[name] for name in names}, folder / file)
    where = {name: files[index % shards] for index, name in enumerate(tensors)}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def _write_tokenizer(folder, first, limit, is_lower_cased):
    special = ["<s>", "<pad>", "</s>", "<unk>"] if first else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    start, pad, end, unknown = special if first else [special[index] for index in (2, 0, 3, 1)]
    vocabulary = [*special, *(f"w{number}" for number in range(WORDS))]
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if is_lower_cased:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, ids[start]), (end, ids[end])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "unk_token": unknown}
    most = {"model_max_length": 10**30 if limit is None else limit}
    _write_json(folder / "tokenizer_config.json", config | most)
