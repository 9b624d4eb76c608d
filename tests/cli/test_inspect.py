"""`cudagraph-jax inspect`."""

from __future__ import annotations

import json
import sys

import jax
import pytest

from cudagraph_jax.cli import main
from cudagraph_jax.cli.named_function import compiled_with, inspected, without_cache
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.modes import CommandBufferScope
from cudagraph_jax.shapes.ladder import Bucket

MODULE = """
import jax.numpy as jnp
import numpy as np

import cudagraph_jax


class Group:
    @staticmethod
    def mlp(weights, x):
        return jnp.tanh(x @ weights)


def see(images, edges):
    return images.sum(3), edges * 2


mlp = Group.mlp
pictures = (np.ones((2, 3, 5, 3), np.float32), np.ones((2, 4), np.float32))
wide = cudagraph_jax.CUDAGraphConfig(capture_axes={"height": (4, 8), "width": (4, 8)})
sights = cudagraph_jax.bucket_jit(
    see, in_axes=("batch height width _", "batch height+1"), config=wide
)
number = 3
arguments = (np.eye(8, dtype=np.float32), np.ones((2, 3, 8), np.float32))
config = cudagraph_jax.CUDAGraphConfig(
    capture_sizes=(4,), capture_seq_lens=(8,), warmup_iterations=0
)
bucketed = cudagraph_jax.bucket_jit(mlp, in_axes=(None, "batch seq _"), config=config)
captured = cudagraph_jax.bucket_jit(mlp, in_axes=(None, "batch seq _"), config=config)
captured(*arguments)


def given():
    return arguments
"""
WEIGHTS, X = "float32[8,8]", "float32[batch, seq, 8]"
PICTURES = ["--example", "pictures"]
ARGUMENTS = ["--arg", WEIGHTS, "--arg", "float32[batch,7]"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the current directory."""
    (tmp_path / "inspected_model.py").write_text(MODULE)
    (tmp_path / "inspected_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "inspected_model"
    sys.modules.pop("inspected_model", None)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("mlp", ["--arg", WEIGHTS, "--arg", X]),
        ("Group.mlp", ["--arg", WEIGHTS, "--arg", X, "--scope", "FULL"]),
        ("mlp", ["--example", "given", "--in-axes", "none", "--in-axes", "batch seq _"]),
        ("bucketed", ["--arg", WEIGHTS, "--arg", X]),
        ("bucketed", ["--example", "arguments"]),
        ("bucketed", ["--example", "given"]),
        ("captured", []),
    ],
)
def test_on_a_cpu(module, capsys, tmp_path, function, options):
    """A function is found and lowered for the bucket; on a CPU it is said that there is no more."""
    if jax.default_backend() != "cpu":
        pytest.skip("there is an accelerator")
    path = tmp_path / "found.json"
    sizes = ["--batch", "4", "--seq", "16", "--json", str(path)]
    assert main(["inspect", f"{module}:{function}", *sizes, *options]) == 0
    assert "mlp 4x16: XLA has no command buffers on cpu" in capsys.readouterr().out
    assert json.loads(path.read_text())["bucket"] == [4, 16]


IMAGES = ["--arg", "float32[batch,height,width,3]", "--arg", "float32[batch,height+1]"]
AXES = ["--in-axes", "batch height width _", "--in-axes", "batch height+1"]


@pytest.mark.parametrize(
    ("function", "options", "sizes"),
    [
        ("see", IMAGES, {"height": 8, "width": 6}),
        ("see", ["--example", "pictures", *AXES], {"height": 8, "width": 6}),
        ("sights", IMAGES, {"height": 8, "width": 6}),
        ("sights", ["--example", "pictures"], {"width": 8}),
    ],
)
def test_named_axes(module, capsys, tmp_path, function, options, sizes):
    """Sizes of further axes are given by name; those left out are the example's."""
    if jax.default_backend() != "cpu":
        pytest.skip("there is an accelerator")
    path = tmp_path / "found.json"
    given = [text for axis, size in sizes.items() for text in ("--size", f"{axis}={size}")]
    arguments = ["--batch", "4", *given, "--json", str(path), *options]
    assert main(["inspect", f"{module}:{function}", *arguments]) == 0
    whole = {"height": 3, **sizes}
    named = f"height={whole['height']},width={whole['width']}"
    assert f"see 4x1,{named}: XLA has no command buffers" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert (found["bucket"], found["axes"]) == ([4, 1], whole)


def test_sizes_that_nothing_carries(module):
    """A size that no argument carries is that of the arguments."""
    found = inspected(
        f"{module}:mlp",
        {"batch": 4, "seq": 16},
        arguments=[WEIGHTS, "float32[batch,8]"],
        example=None,
        scopes=[],
    )
    assert found.bucket == Bucket(4, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspected_model"], "names no function: write MODULE:FUNCTION"),
        (["inspected_nowhere:mlp"], "run it from the directory that has the module"),
        (["inspected_model.py:mlp"], "not its file: inspected_model:mlp"),
        (["inspected_broken:mlp"], "ZeroDivisionError: division by zero\n"),
        (["inspected_model:none"], "inspected_model has no none"),
        (["inspected_model:number"], "is no function but 3"),
        (["inspected_model:mlp"], "describe its arguments with --arg"),
        (
            ["inspected_model:mlp", "--example", "given"],
            "its example has 2 argument(s), float32[8,8], float32[2,3,8], for 0 --in-axes: say",
        ),
        (["inspected_model:mlp", "--example", "given", "--in-axes", "none"], "for 1 --in-axes"),
        (
            ["inspected_model:bucketed", "--example", "given", "--in-axes", "none"],
            "not for inspected_model:bucketed: leave it out",
        ),
        (["inspected_model:bucketed"], "describe them with --arg or --example"),
        (["inspected_model:mlp", "--arg", "float32"], "write it as 'int32[batch,seq]'"),
        (["inspected_model:mlp", "--arg", "float32[x]"], "the dimension 'x'"),
        (["inspected_model:mlp", "--arg", "float32[x*2]"], "the dimension 'x*2'"),
        (["inspected_model:sights", "--size", "hight=8", *PICTURES], "did you mean 'height'?"),
        (["inspected_model:mlp", "--arg", "float33[2]"], "unknown dtype: float33"),
        (["inspected_model:bucketed", "--example", "number"], "as a tuple"),
        (["inspected_model:bucketed", "--example", "none"], "has no none"),
        (
            ["inspected_model:bucketed", "--example", "given", "--arg", WEIGHTS],
            "give one of the two",
        ),
        (["inspected_model:mlp", "--arg", WEIGHTS], "names no axis, such as batch or seq"),
        (["inspected_model:mlp", "--arg", X], "missing a required argument"),
        (["inspected_model:mlp", *ARGUMENTS], "cannot trace mlp"),
    ],
)
def test_wrong_arguments(module, capsys, arguments, message):
    """What does not fit is said in one line, and the exit status is 1."""
    assert main(["inspect", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_options_of_the_compiler():
    """A bucketed function keeps its other options with each scope; --option adds to all."""
    full, none = CommandBufferScope.FULL, CommandBufferScope.NONE
    own = {**full.compiler_options(), "xla_a": "1"}
    assert compiled_with(own, [none], ["xla_b=2"]) == {
        "own options": {**own, "xla_b": "2"},
        "NONE": {"xla_gpu_enable_command_buffer": "", "xla_a": "1", "xla_b": "2"},
    }
    assert compiled_with(None, [full], []) == {"FULL": full.compiler_options()}
    with pytest.raises(ConfigError, match="write it as NAME=VALUE"):
        compiled_with(None, [full], ["xla_b"])


def test_the_persistent_cache_is_left_alone():
    """It is off while an inspection compiles, and as it was afterwards."""

    def is_on():
        return getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009  # not in JAX's stubs

    usual = is_on()
    with without_cache():
        assert not is_on()
    assert is_on() == usual


def test_a_wrong_scope(module, capsys):
    """An unknown scope is refused with those that there are."""
    with pytest.raises(SystemExit):
        main(["inspect", f"{module}:mlp", "--scope", "ALL"])
    assert "PIECEWISE" in capsys.readouterr().err


def test_a_size_that_is_none(module, capsys):
    """A size is a name and a whole number."""
    with pytest.raises(SystemExit):
        main(["inspect", f"{module}:see", "--size", "height"])
    assert "no size of an axis, such as height=224" in capsys.readouterr().err
