"""The only door to `jax.experimental.topologies`: devices that need not be here."""

from __future__ import annotations

from importlib.util import find_spec

import jax
from jax.experimental import topologies

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.xla.gpus import target_config

_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def absent_gpu(gpu: str) -> jax.Device:
    """A GPU for which functions can be lowered and compiled, whether or not there is one.

    Nothing can run on it. XLA's CUDA compiler is part of JAX's CUDA plugin, which needs no driver
    for this.

    Args:
        gpu: A name or a file; see `cudagraph_jax.xla.gpus.target_config`.

    Raises:
        ConfigError: The GPU is not known, or XLA's CUDA compiler is not installed.
    """
    config = target_config(gpu)
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=config
        )
    except NotImplementedError as error:
        raise ConfigError(
            f"cannot compile for gpu={gpu!r}: JAX has no compiler for CUDA here ({error}): "
            f"{_remedy()}"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"cannot compile for gpu={gpu!r}: {error} Is it a gpu_target_config.pbtxt of XLA's?"
        ) from error
    device: jax.Device = found.devices[0]
    return device


def has_cuda_plugin() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    return find_spec("jax_plugins") is not None and any(
        find_spec(name) is not None for name in _PLUGINS
    )


def _remedy() -> str:
    if has_cuda_plugin():
        return "set JAX_PLATFORMS=cpu, with which JAX's CUDA plugin asks for no driver"
    return "pip install 'jax[cuda13]', and where there is no GPU set JAX_PLATFORMS=cpu"
