"""No answer depends on the calls before it: any mix of what users pass, in any order."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, InputShapeError, bucket_jit

GRID = CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(4, 8), warmup_iterations=1)


def scaled(params, x, y=None, *, scale=2.0, mode="add", mask):
    """Uses all there is: parameters, a default array, keywords, a static word, and the mask."""
    real = jnp.where(mask, x, 0)
    total = real * scale + params["w"] * params["s"]
    if y is not None:
        total = total + y
    if mode == "mean":
        return {"out": total, "mean": real.sum(1) / jnp.maximum(mask.sum(1), 1).astype(x.dtype)}
    return {"out": total, "whole": total.astype(int)}


@dataclasses.dataclass(frozen=True)
class Written:
    """One call, as it is written."""

    shape: tuple[int, int]
    dtype: str
    kind: str
    other: str
    scale: Any
    mode: str | None
    names_x: bool
    wide: bool
    weak: bool
    device: int

    def arguments(self):
        """The arguments, positional and by keyword."""
        x = KINDS[self.kind](values(self.shape, self.dtype))
        strong = np.float32(1.5)
        params = {
            "w": jnp.asarray(0.5, jnp.bfloat16),
            "s": jnp.asarray(2.0) if self.weak else jnp.asarray(strong),
        }
        kwargs: dict[str, Any] = {}
        args: list[Any] = [params]
        if self.names_x:
            kwargs["x"] = x
        else:
            args.append(x)
        if self.other != "absent":
            y = None if self.other == "none" else KINDS[self.other](values(self.shape, self.dtype))
            if self.names_x:
                kwargs["y"] = y
            else:
                args.append(y)
        if self.scale is not None:
            kwargs["scale"] = self.scale
        if self.mode is not None:
            kwargs["mode"] = self.mode
        return args, kwargs

    @property
    def is_refused(self):
        """Whether it cannot be answered as it is."""
        kinds = {self.kind, self.other}
        lost = (
            self.dtype == "float64"
            and not self.wide
            and not kinds <= {"jax", "committed", "second", *NO_ARRAY}
        )
        return bool(lost or kinds & {"masked", "foreign"})

    def settings(self):
        """What its thread has set for itself."""
        context = contextlib.ExitStack()
        context.enter_context(jax.enable_x64(self.wide))
        context.enter_context(jax.default_device(jax.devices()[self.device]))
        return context

    def expected(self):
        """The plain function's answer, under `jit`."""
        args, kwargs = self.arguments()
        mask = np.ones(self.shape, np.bool_)
        plain = jax.jit(scaled, static_argnames="mode")
        return plain(*args, **kwargs, mask=mask)


class Foreign:
    """An array of another library."""

    def __init__(self, array):
        self.shape, self.dtype, self._array = array.shape, array.dtype, array

    def __array__(self, dtype=None, copy=None):
        return self._array


def values(shape, dtype):
    return (np.arange(np.prod(shape)).reshape(shape) % 5 - 1).astype(jnp.dtype(dtype))


KINDS: dict[str, Any] = {
    "numpy": lambda array: array,
    "jax": jnp.asarray,
    "committed": lambda array: jax.device_put(array, jax.devices()[0]),
    "second": lambda array: jax.device_put(array, jax.devices()[-1]),
    "strided": np.asfortranarray,
    "matrix": lambda array: array.view(np.matrix),
    "masked": lambda array: np.ma.array(array, mask=array > 0),
    "foreign": Foreign,
}
NO_ARRAY = ("absent", "none")

CALLS = st.builds(
    Written,
    shape=st.sampled_from([(1, 1), (1, 8), (2, 3), (3, 4), (3, 5), (4, 8)]),
    dtype=st.sampled_from(["float32", "bfloat16", "int32", "int8", "float64"]),
    kind=st.sampled_from(list(KINDS)),
    other=st.sampled_from([*NO_ARRAY, *KINDS]),
    scale=st.sampled_from([None, 2.0, 3, np.float32(2)]),
    mode=st.sampled_from([None, "add", "mean"]),
    names_x=st.booleans(),
    wide=st.booleans(),
    weak=st.booleans(),
    device=st.sampled_from([0, -1]),
).filter(lambda call: not {"committed", "second"} <= {call.kind, call.other})


class AnyOrder(RuleBasedStateMachine):
    """One bucketed function, or two of one manager, called in any way."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = CUDAGraphManager(GRID)
        make = partial(
            bucket_jit,
            in_axes=(None, "batch seq", "batch seq"),
            static_argnames="mode",
            mask_argname="mask",
            manager=self.manager,
        )
        self.functions = [make(scaled), make(scaled, unpad="device")]
        self.answers = 0
        self.last: tuple[Written, int] | None = None

    def check(self, call: Written, which: int) -> None:
        function = self.functions[which]
        with call.settings():
            args, kwargs = call.arguments()
            if call.is_refused:
                with pytest.raises(InputShapeError):
                    function(*args, **kwargs)
                return
            found, expected = function(*args, **kwargs), call.expected()
            assert sorted(found) == sorted(expected)
            for have, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                assert (have.shape, have.dtype) == (want.shape, want.dtype)
                assert which == 0 or have.devices() == want.devices()
                np.testing.assert_allclose(
                    np.asarray(have, np.float64), np.asarray(want, np.float64), rtol=2e-2
                )
        self.answers += 1

    @initialize(call=CALLS, warms=st.booleans())
    def begin(self, call: Written, warms: bool) -> None:
        if warms and not call.is_refused:
            with call.settings():
                args, kwargs = call.arguments()
                self.functions[0].warmup(*args, progress=False, **kwargs)

    @rule(call=CALLS, which=st.sampled_from([0, 1]))
    def call_it(self, call: Written, which: int) -> None:
        self.last = call, which
        self.check(call, which)

    @precondition(lambda self: self.last)
    @rule(device=st.sampled_from([0, -1]), wide=st.booleans())
    def call_it_with_other_settings(self, device: int, wide: bool) -> None:
        assert self.last is not None
        call, which = self.last
        self.check(dataclasses.replace(call, device=device, wide=wide), which)

    @rule(calls=st.lists(CALLS, min_size=2, max_size=3), which=st.sampled_from([0, 1]))
    def call_it_from_threads(self, calls: list[Written], which: int) -> None:
        with ThreadPoolExecutor(len(calls)) as pool:
            for done in [pool.submit(self.check, call, which) for call in calls]:
                done.result(60)

    @precondition(lambda self: self.answers)
    @rule()
    def drop_everything(self) -> None:
        self.manager.registry.clear()

    @invariant()
    def counts_every_answer(self) -> None:
        """Each answer was a replay, a capture, or an eager run."""
        assert self.manager.stats()["calls"] >= self.answers


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=8 if len(jax.devices()) > 1 else 4,
    stateful_step_count=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow  # devices are counted when JAX starts: a process of its own
@pytest.mark.skipif(len(jax.devices()) > 1, reason="there is more than one device here already")
def test_two_devices():
    """Nor does it depend on which device the calls before it were on, by what they set or pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 skipped" in done.stdout
