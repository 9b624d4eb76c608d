"""Run by test_devices.py: arrays committed to a second device give right answers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, bucket_jit

CONFIG = CUDAGraphConfig(capture_sizes=(2, 4), capture_seq_lens=(4,), warmup_iterations=1)
FIRST, SECOND = jax.devices()
W = np.arange(12, dtype=np.float32).reshape(3, 4)


def project(w, x):
    return x @ w


def check(function, w, x, device):
    expected = np.asarray(x) @ np.asarray(w)
    for _ in range(3):
        found = function(w, x)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        if device is not None:
            assert found.devices() == {device}, found.devices()


def committed_arrays():
    for size in (4, 3):
        function = bucket_jit(project, in_axes=(None, "batch _"), unpad="device", config=CONFIG)
        x = np.ones((size, 3), np.float32)
        for device in (FIRST, SECOND, FIRST, SECOND):
            check(function, jax.device_put(W, device), jax.device_put(x, device), device)
            check(function, jax.device_put(W, device), x, device)
            check(function, W, x, None)
        check(function, jnp.asarray(W), jnp.asarray(x), None)


def executed_where_its_parameters_are():
    manager = CUDAGraphManager(CONFIG)
    x = np.ones((1, 3), np.float32)
    for device in (SECOND, FIRST, SECOND):
        inputs = {"w": jax.device_put(W, device), "x": x}
        for _ in range(2):
            found = manager.execute_or_capture(1, 1, lambda_project, inputs)
            np.testing.assert_allclose(found, x @ W, rtol=1e-5)
    assert manager.registry.num_graphs == 2, manager.stats()


def lambda_project(inputs):
    return inputs["x"] @ inputs["w"]


def warmed_on_the_second():
    function = bucket_jit(project, in_axes=(None, "batch _"), config=CONFIG)
    report = function.warmup(jax.device_put(W, SECOND), np.ones((1, 3), np.float32), progress=False)
    assert not report.failed, report
    check(function, jax.device_put(W, SECOND), np.ones((3, 3), np.float32), None)
    assert function.stats()["misses"] == 0


def other_default_device():
    function = bucket_jit(project, in_axes=(None, "batch _"), unpad="device", config=CONFIG)
    x = np.ones((3, 3), np.float32)
    check(function, W, x, FIRST)
    with jax.default_device(SECOND):
        for _ in range(2):
            np.testing.assert_allclose(function(W, x), x @ W, rtol=1e-5)


def split_on_the_second():
    config = dataclasses.replace(CONFIG, on_overflow="split")
    x = np.ones((9, 3), np.float32)
    for unpad in ("device", "none"):
        function = bucket_jit(project, in_axes=(None, "batch _"), unpad=unpad, config=config)
        for device in (SECOND, FIRST):
            found = function(jax.device_put(W, device), x)
            np.testing.assert_allclose(found[:9], x @ W, rtol=1e-5)
            assert found.devices() == {device}, found.devices()


def split_over_both():
    mesh = Mesh(np.array([FIRST, SECOND]), ("model",))
    config = dataclasses.replace(CONFIG, on_overflow="split")
    w = jax.device_put(W, NamedSharding(mesh, PartitionSpec(None, "model")))
    for unpad in ("host", "device", "none"):
        function = bucket_jit(project, in_axes=(None, "batch _"), unpad=unpad, config=config)
        for size in (9, 8):
            x = np.ones((size, 3), np.float32)
            np.testing.assert_allclose(np.asarray(function(w, x))[:size], x @ W, rtol=1e-5)


def sharded_parameters():
    mesh = Mesh(np.array([FIRST, SECOND]), ("model",))
    w = jax.device_put(W, NamedSharding(mesh, PartitionSpec(None, "model")))
    function = bucket_jit(project, in_axes=(None, "batch _"), config=CONFIG)
    for size in (4, 3):
        check(function, w, np.ones((size, 3), np.float32), None)
        check(function, W, np.ones((size, 3), np.float32), None)


if __name__ == "__main__":
    committed_arrays()
    executed_where_its_parameters_are()
    warmed_on_the_second()
    other_default_device()
    split_on_the_second()
    split_over_both()
    sharded_parameters()
    print("right on both devices")
