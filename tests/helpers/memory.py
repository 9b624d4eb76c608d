"""Executables that take as much memory as a test says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager
from cudagraph_jax.program.program import CompileRequest
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.testing import FakeCompiler
from cudagraph_jax.xla.memory import Memory
from cudagraph_jax.xla.stages import Executable, Lowering

ROW = 400_000


class SizedCompiler:
    """Compiles nothing; each bucket takes what `need` says of it, and runs eagerly.

    Args:
        need: The memory of a bucket.
        one_by_one: The same where XLA is asked for little temporary memory.
    """

    def __init__(
        self,
        need: Callable[[Bucket], Memory],
        *,
        one_by_one: Callable[[Bucket], Memory] | None = None,
    ) -> None:
        self._fake = FakeCompiler(runs=True)
        self._need, self._one_by_one = need, one_by_one or need

    def __call__(
        self, request: CompileRequest, lowering: Lowering, *, clock: Callable[[], float]
    ) -> Executable:
        need = self._one_by_one if "xla_cpu_scheduler_type" in request.options else self._need
        executable = self._fake(request, lowering, clock=clock)
        return dataclasses.replace(executable, memory=need(request.bucket))


def keeps(bucket: Bucket) -> Memory:
    """400 kB for each element, as long as it is held."""
    return Memory(ROW * bucket.elements)


def borrows(bucket: Bucket) -> Memory:
    """400 kB for each element while it runs, and 1 kB of code."""
    return Memory(1000, ROW * bucket.elements)


def sized_manager(
    need: Callable[[Bucket], Memory],
    *,
    one_by_one: Callable[[Bucket], Memory] | None = None,
    **options: object,
) -> CUDAGraphManager:
    """A manager with a pool of 1 MiB, and no runs in a warm-up."""
    config = {"memory_pool_size_mb": 1, "warmup_iterations": 0, **options}
    compiler = SizedCompiler(need, one_by_one=one_by_one)
    return CUDAGraphManager(CUDAGraphConfig.from_dict(config), compiler=compiler)
