"""The errors of the package are one tree."""

import inspect
import pickle
from typing import Any

import numpy as np
import pytest

import cudagraph_jax as cg
from cudagraph_jax import errors

PARENTS = {
    "CUDAGraphError": (Exception,),
    "ConfigError": (errors.CUDAGraphError, ValueError),
    "BucketOverflowError": (errors.CUDAGraphError, ValueError),
    "InputShapeError": (errors.CUDAGraphError, TypeError),
    "CaptureError": (errors.CUDAGraphError, RuntimeError),
    "PaddingLeakError": (errors.CaptureError,),
    "SealedError": (errors.CUDAGraphError, RuntimeError),
    "QueueFullError": (errors.CUDAGraphError, RuntimeError),
    "DeadlineError": (errors.CUDAGraphError, TimeoutError),
    "DistributedError": (errors.CUDAGraphError, RuntimeError),
    "UnexpectedCompileError": (errors.CUDAGraphError, RuntimeError),
    "UnpicklableError": (errors.CUDAGraphError, TypeError),
    "StoreError": (errors.CUDAGraphError, OSError),
    "CUDAGraphWarning": (UserWarning,),
}


def test_tree():
    """These are all the errors there are, each below the built-in one that a caller expects."""
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    assert {name: value.__bases__ for name, value in classes.items()} == PARENTS


def test_docstring_draws_the_tree():
    """The module's docstring shows each error and its built-in parent."""
    drawn = inspect.getdoc(errors) or ""
    for name, parents in PARENTS.items():
        if name == "CUDAGraphWarning":
            continue
        builtin = f" ({parents[1].__name__})" if len(parents) > 1 else ""
        assert f"{name}{builtin}" in drawn


@pytest.mark.parametrize("name", PARENTS)
def test_message(name):
    """Each takes one message, which is its text, also after pickling."""
    error = getattr(errors, name)("batch=300 is too large")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) == "batch=300 is too large"


def test_capture_error_keeps_its_stage():
    """A capture error knows the step that failed, "compile" unless told, also after pickling."""
    assert errors.CaptureError("no").stage == "compile"
    assert errors.PaddingLeakError("no").stage == "check"
    assert pickle.loads(pickle.dumps(errors.CaptureError("no", stage="trace"))).stage == "trace"


TREE: Any = {"w": [np.arange(200.0).reshape(50, 4)] * 3}
"""Parameters, which are given in the place of something else; whole they would fill screens."""
TEXT: Any = str(TREE)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: cg.bucket_jit(TREE, in_axes="batch"),
        lambda: cg.bucket_jit(abs, in_axes="batch", config=TREE),
        lambda: cg.bucket_jit(abs, in_axes="batch", manager=TREE),
        lambda: cg.bucket_jit(abs, in_axes="batch", unpad=TREE["w"][0]),
        lambda: cg.bucket_jit(abs, in_axes="batch", pad_side=TREE["w"][0]),
        lambda: cg.CUDAGraphConfig(on_miss=TREE["w"][0]),
        lambda: cg.bucket_jit(abs, in_axes="batch", store="s", fingerprint=TREE),
        lambda: cg.CUDAGraphConfig(on_miss=TEXT),
        lambda: cg.CUDAGraphConfig(capture_axes=TREE["w"]),
        lambda: cg.CUDAGraphConfig(capture_sizes=TEXT),
        lambda: cg.CUDAGraphConfig(enabled=TREE),
        lambda: cg.CUDAGraphConfig.from_plan(TREE),
        lambda: cg.CUDAGraphManager(TREE),
        lambda: cg.Batcher(TREE, abs),
        lambda: cg.GraphStore(TREE),
        lambda: cg.plan_buckets([1], max_graphs=TREE),
        lambda: cg.plan_buckets([1], max_graphs=1, cost=TREE),
        lambda: cg.plan_buckets(TEXT, max_graphs=1),
    ],
)
def test_what_is_given_by_mistake_is_not_written_out(mistake):
    """An error quotes the beginning of a value that may be anything."""
    with pytest.raises(errors.CUDAGraphError) as caught:
        mistake()
    assert len(str(caught.value)) < 350, str(caught.value)
