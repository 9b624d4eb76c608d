"""What XLA must know of a GPU to compile for it."""

import pytest

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.xla.gpus import GPUS, target_config


@pytest.mark.parametrize("name", GPUS)
def test_known_gpus(name):
    """A name, however it is written, is a description that says what the GPU is called."""
    text = target_config(name.upper())
    assert f'device_description_str: "{GPUS[name].name}"' in text
    assert text.count("{") == text.count("}")


def test_hopper():
    """The figures are those of the GPU that is meant."""
    text = target_config("h200")
    assert "cuda_compute_capability { major: 9 minor: 0 }" in text
    assert "core_count: 132" in text
    assert "device_memory_size: 151397597184" in text


def test_a_file(tmp_path):
    """A file is taken as it is."""
    path = tmp_path / "gpu_target_config.pbtxt"
    path.write_text(target_config("a100"))
    assert target_config(str(path)) == target_config("a100")


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("", "core_count"),
        (target_config("h100").replace("core_count: 132", "core_count: 0"), "core_count is"),
        (target_config("h100").replace("CUDA", "ROCM"), "platform_name is"),
    ],
)
def test_a_file_that_lacks_something(tmp_path, text, missing):
    """What XLA would divide by must be there: it ends the process otherwise."""
    path = tmp_path / "gpu.pbtxt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"describes no CUDA GPU: .*{missing}"):
        target_config(str(path))


def test_unknown(tmp_path):
    """What is neither is refused with the names that there are."""
    with pytest.raises(ConfigError, match="gpu='h300' is none of a100, h100, h200, b200"):
        target_config("h300")
    with pytest.raises(ConfigError, match="no readable file"):
        target_config(str(tmp_path))
