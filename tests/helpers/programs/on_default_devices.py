"""Threads, each with a default device of its own and weights there, call one function."""

import threading

import jax
import numpy as np

from cudagraph_jax import CUDAGraphConfig, bucket_jit

config = CUDAGraphConfig(capture_sizes=(2, 4), capture_seq_lens=(8,), warmup_iterations=1)
plain = bucket_jit(
    lambda w, x: x * w, in_axes=(None, "batch seq"), unpad="none", name="plain", config=config
)
errors: list[str] = []


def serve(number: int, as_jax: bool) -> None:
    device = jax.devices()[number % 2]
    with jax.default_device(device):
        weights = jax.device_put(np.float32(number), device)
        for rows in (3, 4, 2) * 10:
            x = np.ones((rows, 5 + 3 * (rows == 4)), np.float32)
            given = jax.device_put(x) if as_jax else x
            try:
                answer = plain(weights, given)
            except Exception as error:
                errors.append(f"{number} {error!r}")
                return
            if answer.devices() != {device}:
                errors.append(f"{number} ran on {answer.devices()}")
            if not np.all(np.asarray(answer)[:rows, : x.shape[1]] == number):
                errors.append(f"{number} has another's answer")


for as_jax in (False, True):
    threads = [threading.Thread(target=serve, args=(number, as_jax)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
assert not errors, errors[:5]
assert plain.stats()["registry"]["num_graphs"] == 4
print("each on its own device")
