"""GPUs that XLA can compile for without having them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from cudagraph_jax.errors import ConfigError

if TYPE_CHECKING:
    import jax

_NEEDED = (
    "block_dim_limit_x",
    "block_dim_limit_y",
    "block_dim_limit_z",
    "clock_rate_ghz",
    "core_count",
    "device_memory_size",
    "fpus_per_core",
    "l2_cache_size",
    "major",
    "memory_bandwidth",
    "registers_per_block_limit",
    "registers_per_core_limit",
    "shared_memory_per_block",
    "shared_memory_per_block_optin",
    "shared_memory_per_core",
    "threads_per_block_limit",
    "threads_per_core_limit",
    "threads_per_warp",
)
# XLA records control flow from CUDA 12.3 on, and slices by a loop's counter from 12.9 on.
_CUDA = "12.9.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """What XLA's compiler asks of a GPU.

    The values are those of XLA's own descriptions:
    https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs

    Args:
        name: What CUDA calls it.
        capability: Its compute capability, major and minor.
        multiprocessors: How many it has.
        float_units: Float32 units of a multiprocessor.
        memory_bytes: Its memory.
        bandwidth_bytes: Bytes a second from that memory.
        l2_bytes: Its L2 cache.
        clock_ghz: The highest clock.
        shared_bytes: Shared memory of a multiprocessor.
        block_shared_bytes: What one block may have of it.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    float_units: int
    memory_bytes: int
    bandwidth_bytes: int
    l2_bytes: int
    clock_ghz: float
    shared_bytes: int
    block_shared_bytes: int

    def target_config(self) -> str:
        """A `GpuTargetConfigProto` of XLA's as text, with CUDA 12.9."""
        major, minor = self.capability
        return f"""\
gpu_device_info {{
  name: "{self.name}"
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {self.multiprocessors}
  fpus_per_core: {self.float_units}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  memory_bandwidth: {self.bandwidth_bytes}
  l2_cache_size: {self.l2_bytes}
  shared_memory_per_core: {self.shared_bytes}
  shared_memory_per_block_optin: {self.block_shared_bytes}
  shared_memory_per_block: 49152
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "{_CUDA}"
  runtime_version: "{_CUDA}"
  compile_time_toolkit_version: "{_CUDA}"
}}
platform_name: "CUDA"
device_description_str: "{self.name}"
"""


_HOPPER = GPU(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    multiprocessors=132,
    float_units=128,
    memory_bytes=84_942_979_072,
    bandwidth_bytes=3_352_320_000_000,
    l2_bytes=52_428_800,
    clock_ghz=1.98,
    shared_bytes=233_472,
    block_shared_bytes=232_448,
)
GPUS = MappingProxyType(
    {
        "a100": GPU(
            name="NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            multiprocessors=108,
            float_units=64,
            memory_bytes=85_100_068_864,
            bandwidth_bytes=2_039_040_000_000,
            l2_bytes=41_943_040,
            clock_ghz=1.41,
            shared_bytes=167_936,
            block_shared_bytes=166_912,
        ),
        "h100": _HOPPER,
        "h200": replace(
            _HOPPER,
            name="NVIDIA H200",
            memory_bytes=151_397_597_184,
            bandwidth_bytes=4_800_000_000_000,
        ),
        "b200": replace(
            _HOPPER,
            name="NVIDIA B200",
            capability=(10, 0),
            multiprocessors=148,
            memory_bytes=191_514_411_008,
            bandwidth_bytes=7_672_320_000_000,
            l2_bytes=132_644_864,
            clock_ghz=1.965,
        ),
    }
)


def target_config(gpu: str) -> str:
    """What XLA must know of a GPU to compile for it: a `GpuTargetConfigProto` as text.

    Args:
        gpu: One of `GPUS`, or the path of a file with that text; XLA writes one for each program
            that it dumps on a GPU, `*.gpu_target_config.pbtxt`.

    Raises:
        ConfigError: It is neither, or the file lacks what XLA divides by.
    """
    known = GPUS.get(gpu.lower())
    return _read(gpu) if known is None else known.target_config()


def _read(gpu: str) -> str:
    try:
        text = Path(gpu).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"gpu={gpu!r} is none of {', '.join(GPUS)}, and no readable file: {error}. Name one "
            "of these, or a gpu_target_config.pbtxt that XLA dumped on such a GPU"
        ) from error
    # XLA takes what is missing for 0, and ends the process where it divides by it.
    missing = [field for field in _NEEDED if not re.search(rf"\b{field}: *[\"1-9]", text)]
    if missing or 'platform_name: "CUDA"' not in text:
        raise ConfigError(
            f"gpu={gpu!r} describes no CUDA GPU: {', '.join(missing) or 'platform_name'} is "
            "missing. Take a gpu_target_config.pbtxt that XLA dumped on one "
            "(XLA_FLAGS=--xla_dump_to=DIR)"
        )
    return text


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
    # Only here: a command line that lists the GPUs does without JAX.
    import jax
    from jax.experimental import topologies

    config = target_config(gpu)
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=config
        )
    except NotImplementedError as error:  # of JAX, where no plugin knows the platform
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
