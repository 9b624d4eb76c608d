"""Settings of JAX that a thread may have for itself: part of a program, as in `jax.jit`'s key."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cudagraph_jax import Batcher, CUDAGraphConfig, CUDAGraphManager, bucket_jit
from tests.helpers.processes import run_script

CONFIG = CUDAGraphConfig(capture_sizes=(1, 2, 4), capture_seq_lens=(8, 16), warmup_iterations=1)
LARGE = 2**40 + 1


def several(x):
    return x + 1, x.astype(int), jnp.zeros(()) + 0.5


@pytest.mark.parametrize("shape", [(3, 5), (4, 8)], ids=["padded", "exact"])
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("wide_first", [False, True])
def test_x64(shape, as_array, wide_first):
    """A warm function computes in 64 bits within `jax.enable_x64(True)`, and only there."""
    function = bucket_jit(several, in_axes="batch seq", config=CONFIG)

    def call(dtype):
        x = as_array(np.full(shape, LARGE if dtype == np.int64 else 3, dtype))
        for got, expected in zip(function(x), jax.jit(several)(x), strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)
        return [leaf.dtype for leaf in function(x)]

    def wide():
        with jax.enable_x64(True):
            assert call(np.int64) == [np.int64, np.int64, np.float64]
            assert call(np.float32) == [np.float32, np.int64, np.float64]

    for _ in range(2):
        if wide_first:
            wide()
        assert call(np.float32) == [np.float32, np.int32, np.float32]
        assert call(np.int32) == [np.int32, np.int32, np.float32]
        wide()


def test_x64_through_the_manager():
    """So do the specification's calls."""
    manager = CUDAGraphManager(CONFIG)
    x = np.ones((3, 5), np.float32)
    for _ in range(2):
        for on, dtype in ((False, np.int32), (True, np.int64)):
            with jax.enable_x64(on):
                out = manager.execute_or_capture(3, 5, to_int, x)
                assert out.dtype == dtype


def to_int(x):
    return x.astype(int)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_matrix_precision(as_array):
    """A matrix precision that a thread asks for is that of its programs."""
    x = as_array(np.ones((4, 8), np.float32))
    function = bucket_jit(lambda x: x @ x.T, in_axes="batch seq", config=CONFIG, unpad="none")
    precisions = {}
    for _ in range(2):
        function(x)
        with jax.default_matmul_precision("highest"):
            function(x)
        precisions = {
            entry.variant.settings: str(entry.executable.call.as_text())
            for entry in function.registry.entries()
        }
        assert len(precisions) == 2
    assert sum("highest" in text for text in precisions.values()) == 1


def test_random_numbers():
    """The implementation of PRNG keys made within the function is that of the thread."""

    def noise(x):
        return x + jax.random.uniform(jax.random.key(0), (8,))

    x = np.zeros((3, 8), np.float32)
    function = bucket_jit(noise, in_axes="batch _", config=CONFIG)
    answers = []
    for name in ("threefry2x32", "rbg", "threefry2x32"):
        with jax.default_prng_impl(name):
            fresh = bucket_jit(noise, in_axes="batch _", config=CONFIG)
            answers.append(fresh(x))
            if name == "threefry2x32":
                np.testing.assert_array_equal(function(x), answers[-1])
    assert np.any(answers[0] != answers[1])


def test_background_captures_have_the_settings_of_the_request():
    """What is captured for a request in 64 bits answers the next one in 64 bits."""
    config = CUDAGraphConfig(
        capture_sizes=(4,), capture_seq_lens=(8,), on_miss="background", warmup_iterations=1
    )
    function = bucket_jit(to_int, in_axes="batch seq", config=config)
    x = np.ones((3, 5), np.float32)
    with function.manager:
        with jax.enable_x64(True):
            assert function(x).dtype == np.int64
            function.manager.wait()
            assert function.explain(x).mode.name == "REPLAY"
            assert function(x).dtype == np.int64
        assert function.explain(x).mode.name != "REPLAY"
        assert function(x).dtype == np.int32


def test_threads_with_settings_of_their_own():
    """Threads that differ in x64 call one function, and each has its own answers."""
    function = bucket_jit(to_int, in_axes="batch seq", config=CONFIG)
    x = np.ones((3, 5), np.float32)
    wrong = []

    def serve(on):
        with jax.enable_x64(on):
            for _ in range(50):
                if function(x).dtype != (np.int64 if on else np.int32):
                    wrong.append(on)

    threads = [threading.Thread(target=serve, args=(number % 2 == 1,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    assert function.registry.num_graphs == 2


@pytest.mark.parametrize("policy", ["split", "exact"])
def test_what_is_not_finite_stops_a_call(policy):
    """Under `jax.debug_nans` a capture, a hit, a split and an entry raise as `jax.jit` does."""
    config = dataclasses.replace(CONFIG, on_overflow=policy)
    function = bucket_jit(lambda x: 2 * jnp.log(x), in_axes="batch seq", config=config)
    calls = [np.full(shape, -1, np.float32) for shape in ((2, 4), (2, 4), (2, 4), (9, 4))]
    with jax.debug_nans(True):
        for x in calls:
            with pytest.raises(FloatingPointError, match=r"not finite .*nan.*disable_jit"):
                function(x)
        (entry, *_) = function.registry.entries()
        with pytest.raises(FloatingPointError, match="in the bucket"):
            entry.replay((calls[0],))
        with jax.disable_jit(), pytest.raises(FloatingPointError, match="in log"):
            function(calls[0])
        assert not np.any(function(-calls[0]))
    assert np.all(np.isnan(function(calls[0])))
    assert sum(function.stats()["errors_by_reason"].values()) == 5


def test_what_is_not_finite_in_a_batcher():
    """An item whose answer is not finite fails with `FloatingPointError`, and no other does."""
    function = bucket_jit(lambda x: 2 * jnp.log(x), in_axes="batch seq", config=CONFIG)
    function.warmup(np.ones((2, 4), np.float32), progress=False)
    jax.config.update("jax_debug_nans", True)  # of all threads
    try:
        with Batcher(function) as batcher:
            good, bad = (batcher.submit(np.full(3, sign, np.float32)) for sign in (1, -1))
            with pytest.raises(FloatingPointError, match="in the bucket"):
                bad.result()
            assert not np.any(good.result())
    finally:
        jax.config.update("jax_debug_nans", False)


def test_the_first_call_under_a_mesh():
    """The first call of a process under a mesh is served in a bucket, as all later ones are."""
    done = run_script(
        """
        import jax, numpy as np, cudagraph_jax

        config = cudagraph_jax.CUDAGraphConfig(capture_sizes=(4,))
        double = cudagraph_jax.bucket_jit(
            lambda x: x * 2, in_axes="batch _", unpad="none", config=config
        )
        with jax.set_mesh(jax.make_mesh((1,), ("data",))):
            print(double(np.ones((3, 5), np.float32)).shape, double.stats()["eager_by_reason"])
        """
    )
    assert done.stdout.strip() == "(4, 5) {}", done.stderr
