"""Run by test_devices.py with x64 on: 64-bit arrays are computed in 64 bits."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from cudagraph_jax import CUDAGraphConfig, bucket_jit

CONFIG = CUDAGraphConfig(
    capture_sizes=(2, 4), capture_seq_lens=(4,), warmup_iterations=1, debug_mode=True
)


def scaled(x, by):
    return x * by


def main():
    function = bucket_jit(scaled, in_axes=("batch seq", None), config=CONFIG)
    draw = np.random.default_rng(0)
    for dtype in (np.float64, np.float32, np.int64, np.int32, np.complex128):
        for size in (2, 4, 3):
            x: Any = (draw.standard_normal((size, 3)) * 2**20).astype(dtype)
            for _ in range(2):
                found = function(x, dtype(3))
                assert found.dtype == dtype, (found.dtype, dtype)
                np.testing.assert_array_equal(found, x * dtype(3))
    with jax.enable_x64(False):
        x = np.ones((3, 3), np.int64)
        for _ in range(2):
            assert function(x, np.int32(2)).dtype == np.int32
    assert function(x, np.int64(2)).dtype == np.int64


if __name__ == "__main__":
    main()
    print("right in 64 bits")
