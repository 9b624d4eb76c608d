"""A configuration as code."""

import pytest

from cudagraph_jax import CUDAGraphConfig
from cudagraph_jax.cli.plan_command import config_source


def made(source):
    """The configuration that the code makes."""
    names: dict[str, CUDAGraphConfig] = {}
    exec(source, names)
    return names["config"]


@pytest.mark.parametrize("lengths_alone", [True, False])
@pytest.mark.parametrize("count", [1, 2, 16, 200])
def test_it_runs(count, lengths_alone):
    """The code makes an equal configuration, and no line of it is too long."""
    config = CUDAGraphConfig(
        capture_sizes=range(1, count + 1),
        capture_seq_lens=range(1000, 1000 + count),
        capture_axes={"height": range(2000, 2000 + count)} if count > 1 else {},
    )
    source = config_source(config, lengths_alone=lengths_alone)
    assert made(source) == config
    assert max(map(len, source.splitlines())) <= 100


def test_how_it_looks():
    """Short ladders stand on one line, longer ones below their name."""
    config = CUDAGraphConfig(capture_sizes=(1,), capture_seq_lens=range(50, 80))
    assert config_source(config, lengths_alone=True) == (
        "from cudagraph_jax import CUDAGraphConfig\n"
        "\n"
        "config = CUDAGraphConfig(\n"
        "    capture_sizes=(1,),  # no batch sizes were given: put yours here\n"
        "    capture_seq_lens=(\n"
        "        50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69,\n"
        "        70, 71, 72, 73, 74, 75, 76, 77, 78, 79,\n"
        "    ),\n"
        ")"
    )
