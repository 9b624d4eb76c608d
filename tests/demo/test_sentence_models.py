"""Encoders of other folders: sentence-transformers gives the same vectors, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cudagraph_jax import CUDAGraphConfig, GraphStore
from cudagraph_jax.demo import DemoError, Encoder
from cudagraph_jax.demo.bert.model_folder import read_folder
from cudagraph_jax.demo.encoder import model_fingerprint
from tests.helpers.sentence_folders import CASES, HIDDEN, POSITIONS, TEXTS, WORDS, write

# As tests/helpers/programs/sentence_vectors.py has had it from sentence-transformers.
VECTORS = json.loads(Path(__file__).with_name("sentence_vectors.json").read_text())["tiny"]
POOLINGS = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
ONE = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(32,), warmup_iterations=0)


@pytest.mark.parametrize("name", CASES)
def test_sentence_transformers_gives_the_same(name, tmp_path):
    """Every family, activation, pooling, head and kind of file gives the original's vectors."""
    encoder = Encoder(ONE, model=write(tmp_path / "tiny", **CASES[name]))
    found = encoder.embed(TEXTS)
    np.testing.assert_allclose(found, VECTORS[name], atol=1e-5)
    assert found.dtype == np.float32
    assert found.shape == (len(TEXTS), encoder.embedding_size)


@pytest.mark.parametrize("name", [*POOLINGS, "two dense", "roberta"])
def test_packed_texts_get_the_same(name, tmp_path):
    """Texts that share a row are pooled each for itself."""
    encoder = Encoder(ONE, model=write(tmp_path / "tiny", **CASES[name]), packing=True)
    packed = encoder.embed([TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[0]])
    np.testing.assert_allclose(packed, [*VECTORS[name], VECTORS[name][0]], atol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder that is only read."""
    return write(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture
def copied(tiny, tmp_path):
    """A folder that a test may change."""
    return shutil.copytree(tiny, tmp_path / "changed")


def change(path, **values):
    """Changes keys of a JSON file; Ellipsis takes them out."""
    content = {**json.loads(path.read_text()), **values} if path.exists() else values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_what_the_encoder_tells_of_its_model(tiny):
    """Its name is the folder's, and its limits and sizes are the model's."""
    encoder = Encoder(model=f"{tiny}/")
    assert (encoder.name, encoder.vocab_size) == ("tiny-bert", WORDS + 5)
    assert (encoder.max_tokens, encoder.embedding_size) == (20, HIDDEN)
    assert encoder.config.capture_seq_lens == (15, 20)
    assert encoder.embed([]).shape == (0, HIDDEN)


@pytest.mark.parametrize("packing", [False, True])
def test_the_vector_of_an_answer(tiny, packing):
    """A single text through the batcher has its vector in the answer, packing or not."""
    encoder = Encoder(ONE, model=tiny, packing=packing)
    encoder.warmup(progress=False)
    answers = encoder.batcher.map(map(encoder.item, encoder.tokenize(TEXTS)))
    found = [encoder.vector(answer) for answer in answers]
    np.testing.assert_allclose(found, VECTORS["mean"], atol=1e-5)
    assert {(str(vector.dtype), vector.shape) for vector in found} == {("float32", (HIDDEN,))}


def test_which_texts_were_cut(tiny):
    """Texts that lose their end are told, and the others not, up to the very limit."""
    tokenize = Encoder(ONE, model=tiny).tokenize
    texts = ["w1 " * count for count in (0, 17, 18, 19, 200)]
    rows, cuts = tokenize.with_cuts(texts)
    assert rows == tokenize(texts)
    assert [len(row) for row in rows] == [2, 19, 20, 20, 20]
    assert cuts == [False, False, False, True, True]


def test_the_grid_may_be_shorter_than_the_model(tiny):
    """Texts are cut at the longest length of the grid, so that the batcher takes all of them."""
    grid = CUDAGraphConfig(capture_sizes=(1, 4), capture_seq_lens=(4, 8), warmup_iterations=0)
    encoder = Encoder(grid, model=tiny)
    assert encoder.max_tokens == 8
    cold = encoder.embed(TEXTS)
    encoder.warmup(progress=False)
    np.testing.assert_allclose(encoder.embed(TEXTS), cold, atol=1e-5)
    assert encoder.batcher.stats()["items"]["answered"] == len(TEXTS)
    with pytest.raises(DemoError, match=r"2 tokens at most are 2 special ones.*capture_seq_lens"):
        Encoder(CUDAGraphConfig(capture_seq_lens=(2,)), model=tiny)


def test_a_grid_longer_than_the_positions(tiny):
    """A bucket may be longer than any text of the model."""
    longer = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(64,), warmup_iterations=0)
    np.testing.assert_allclose(Encoder(longer, model=tiny).embed(TEXTS), VECTORS["mean"], atol=1e-5)


def test_models_of_one_architecture_share_a_store(tmp_path):
    """What is stored for a model is loaded for another of its architecture, and for no other."""
    store, folders = GraphStore(tmp_path / "store"), {}
    for name in ("mean", "float16", "relu", "cls"):
        folders[name] = write(tmp_path / name, **CASES[name])
        encoder = Encoder(ONE, model=folders[name], store=store)
        report = encoder.warmup(progress=False)
        assert report.loaded == (name == "float16")
        np.testing.assert_allclose(encoder.embed(TEXTS), VECTORS[name], atol=1e-5)
    architectures = {name: read_folder(path).architecture for name, path in folders.items()}
    assert architectures["mean"] == architectures["float16"]
    assert len({model_fingerprint(each) for each in architectures.values()}) == 3


def test_the_limit_of_the_tokens(copied):
    """The limit is the folder's own, else the tokenizer's, and the positions at the most."""
    own, tokenizer = copied / "sentence_bert_config.json", copied / "tokenizer_config.json"
    for given, of_tokenizer, expected in [
        (12, 16, 12),
        (None, 16, 16),
        (..., 10**30, POSITIONS),
        (..., ..., POSITIONS),
        (512, 16, POSITIONS),
    ]:
        change(own, max_seq_length=given)
        change(tokenizer, model_max_length=of_tokenizer)
        assert read_folder(copied).max_tokens == expected


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family": (
        "config.json",
        {"model_type": "t5"},
        r"model_type='t5', expected 'bert' or 'camembert' or .*: give another model, or run",
    ),
    "relative positions": (
        "config.json",
        {"position_embedding_type": "relative_key"},
        "position_embedding_type='relative_key', expected 'absolute'",
    ),
    "code": ("config.json", {"auto_map": {"AutoModel": "m.M"}}, "expected no code of the model's"),
    "a decoder": ("config.json", {"is_decoder": True}, "is_decoder=True, expected False"),
    "heads": ("config.json", {"num_attention_heads": 5}, "heads=5, expected a divisor of 32: save"),
    "no size": ("config.json", {"hidden_size": ...}, "no 'hidden_size', expected one of type int"),
    "no layers": ("config.json", {"num_hidden_layers": 0}, "=0, expected a positive integer"),
    "text for a number": ("config.json", {"layer_norm_eps": "1"}, "eps='1', expected one of type"),
    "activation": ("config.json", {"hidden_act": "mish"}, "act='mish', expected 'gelu' or"),
    "pooling": ("1_Pooling/config.json", {"pooling_mode": "median"}, "'median', expected some of"),
    "poolings": ("1_Pooling/config.json", {"pooling_mode": [["cls"]]}, "expected some of cls, max"),
    "width of the pooling": (
        "1_Pooling/config.json",
        {"embedding_dimension": 33},
        "embedding_dimension=33, expected the transformer's hidden size, 32",
    ),
    "width of a head": ("2_Dense/config.json", {"in_features": 8}, "in_features=8, expected 32"),
    "a head's activation": (
        "2_Dense/config.json",
        {"activation_function": "torch.nn.modules.activation.GELU"},
        "GELU', expected 'torch.nn.modules.activation.Tanh' or 'torch.nn.modules.linear.Identity'",
    ),
    "a residual": ("2_Dense/config.json", {"use_residual": True}, "use_residual=True, expected Fa"),
    "a head over tokens": (
        "2_Dense/config.json",
        {"module_input_name": "token_embeddings"},
        "module_input_name='token_embeddings', expected 'sentence_embedding'",
    ),
    "another task": (
        "sentence_bert_config.json",
        {"transformer_task": "fill-mask"},
        "transformer_task='fill-mask', expected 'feature-extraction'",
    ),
    "no tokens": (
        "sentence_bert_config.json",
        {"max_seq_length": -1},
        "expected a positive number",
    ),
    "texts that lose their beginning": (
        "tokenizer_config.json",
        {"truncation_side": "left"},
        "truncation_side='left', expected 'right'",
    ),
    "an unknown prompt": (
        "config_sentence_transformers.json",
        {"default_prompt_name": "nothing"},
        "default_prompt_name='nothing', expected the name of one of the prompts",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused(name, tmp_path):
    """The error names the file, what stands there, what was expected and what to do."""
    file, values, message = REFUSED[name]
    folder = write(tmp_path / "tiny", dense=[(8, "torch.nn.modules.activation.Tanh", True)])
    change(folder / file, **values)
    with pytest.raises(DemoError, match=f"{file} has .*{message}"):
        read_folder(folder)


def test_a_prompt_that_is_not_pooled(copied):
    """A default prompt whose tokens the pooling is to leave out is refused."""
    change(copied / "1_Pooling/config.json", include_prompt=False)
    assert read_folder(copied).prompt == ""
    change(copied / "config_sentence_transformers.json", default_prompt_name="query")
    with pytest.raises(DemoError, match="include_prompt=False, expected True"):
        read_folder(copied)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["sentence_transformers.models.Transformer"], "lists the modules Transformer; expected"),
        (
            [f"sentence_transformers.models.{name}" for name in ("Transformer", "CNN", "Pooling")],
            "modules Transformer, CNN, Pooling; expected Transformer, Pooling, any Dense and at",
        ),
        (["custom.Transformer", "sentence_transformers.models.Pooling"], "modules custom.Tran"),
        ([None], "modules None; expected"),
        (None, "is no list of modules by type and path"),
        (["no path"], "is no list of modules by type and path"),
    ],
)
def test_other_modules(copied, modules, message):
    """A model that is put together in another way is refused by what it has."""
    path = "no path" if modules == ["no path"] else "path"
    listed = modules and [{"type": module, path: ""} for module in modules]
    (copied / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(DemoError, match=f"modules.json .*{message}"):
        read_folder(copied)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("modules.json", "is missing: save the model again, by SentenceTransformer"),
        ("config.json", "is missing: save the model again"),
        ("1_Pooling/config.json", "is missing: save the model again"),
        ("tokenizer.json", r"is missing: write it by AutoTokenizer.from_pretrained"),
    ],
)
def test_missing_files(copied, file, message):
    """A file that is missing is named, with how to write it."""
    (copied / file).unlink()
    with pytest.raises(DemoError, match=f"{file} {message}"):
        Encoder(model=copied)


def test_no_weights_in_safetensors(copied):
    """Weights in pickles alone are not read."""
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(
        DemoError, match=r"has pytorch_model\.bin, expected model\.safetensors: save"
    ):
        Encoder(model=copied)
    (copied / "pytorch_model.bin").unlink()
    with pytest.raises(DemoError, match=r"has no weights, expected model\.safetensors"):
        Encoder(model=copied)


@pytest.mark.parametrize("content", ["{", "\0", "[]"])
def test_broken_json(copied, content):
    """A file that is no JSON object is named."""
    (copied / "config.json").write_text(content)
    with pytest.raises(DemoError, match=r"config\.json (cannot be read as JSON|holds no JSON obj)"):
        read_folder(copied)


@pytest.mark.parametrize("given", ["nowhere", "tiny-bert/config.json"])
def test_no_folder(tiny, given):
    """A path that is no folder is refused by its name."""
    with pytest.raises(DemoError, match=f"{given}' is no folder: give one that SentenceTransfo"):
        Encoder(model=tiny.parent / given)


def test_tensors_that_do_not_fit(copied):
    """A tensor that is missing or not as the configuration says is named before anything runs."""
    weights = copied / "model.safetensors"
    tensors = load_file(weights)
    name = "encoder.layer.1.output.dense.weight"
    for other, message in [
        (tensors[name][:, 1:], r"with the shape \(32, 47\) in F32, expected \(32, 48\), as config"),
        (tensors[name].astype(np.int32), r"with the shape \(32, 48\) in I32, expected \(32, 48\)"),
    ]:
        save_file({**tensors, name: np.ascontiguousarray(other)}, weights)
        with pytest.raises(DemoError, match=f"model.safetensors has the tensor '{name}' {message}"):
            Encoder(model=copied)
    save_file({other: tensors[other] for other in tensors if other != name}, weights)
    with pytest.raises(DemoError, match=rf"has no tensor '{name}' \(but cls.bias, .*\), expected"):
        Encoder(model=copied)
    weights.write_bytes(b"no tensors")
    with pytest.raises(DemoError, match=r"model\.safetensors cannot be read \("):
        Encoder(model=copied)


def test_the_weights_of_a_head_are_missing(tmp_path):
    """Each dense module has a file of its own."""
    folder = write(tmp_path / "tiny", **CASES["tanh"])
    (folder / "2_Dense/model.safetensors").unlink()
    with pytest.raises(
        DemoError, match=r"2_Dense/model\.safetensors cannot be read \(.*: save the"
    ):
        Encoder(model=folder)


def test_a_shard_is_missing(tmp_path):
    """A file that the index names must be there, and the index must name files."""
    folder = write(tmp_path / "tiny", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DemoError, match=r"model-00002-of-00002\.safetensors cannot be read \("):
        Encoder(model=folder)
    change(folder / "model.safetensors.index.json", weight_map=...)
    with pytest.raises(DemoError, match=r"index\.json has no 'weight_map', expected one of type"):
        Encoder(model=folder)


def test_a_tokenizer_that_does_not_fit(copied):
    """Token ids that the model has no row for are refused, and a file that is no tokenizer."""
    change(copied / "config.json", vocab_size=50)
    with pytest.raises(DemoError, match=r"tokenizer\.json has the token id 93, .*vocab_size=50"):
        Encoder(model=copied)
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(DemoError, match=r"tokenizer\.json cannot be read \(.*AutoTokenizer"):
        Encoder(model=copied)


def test_texts_without_end(tmp_path):
    """Of a very long text the same tokens are kept as of its beginning, and it lost its end."""
    encoder = Encoder(model=write(tmp_path / "model"))
    for word in ("w1 w2 ", "w3", "\N{CJK UNIFIED IDEOGRAPH-4E00}", " "):
        rows, cuts = encoder.tokenize.with_cuts([word * 200_000, "w5"])
        short, _ = encoder.tokenize.with_cuts([word * 5_000])
        assert rows[0] == short[0]
        assert cuts == [len(rows[0]) == encoder.max_tokens, False]
