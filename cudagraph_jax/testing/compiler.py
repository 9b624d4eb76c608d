"""A compiler for tests that should not wait for XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from cudagraph_jax._base.text import error_text
from cudagraph_jax.errors import CaptureError, CUDAGraphError
from cudagraph_jax.program.call import has_tracers
from cudagraph_jax.program.program import CompileRequest
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.memory import Memory
from cudagraph_jax.xla.stages import Executable, Lowering


class FakeCompile(NamedTuple):
    """What a `FakeCompiler` was asked for: a function's name, and the bucket."""

    name: str
    bucket: Bucket


class FakeCompiler:
    """Gives every bucket an executable at once, so that tests of serving code are fast.

    Everything around it is real: padding, trimming, counts, limits, queues, refusals of other
    shapes. The function is still traced for its shapes.

        manager = CUDAGraphManager(config, compiler=FakeCompiler())
        embed = bucket_jit(fn, in_axes="batch seq", manager=manager)

    Args:
        runs: Whether a replay runs the plain function on the padded inputs, operation by
            operation, which JAX compiles once for each shape; otherwise it gives zeros.
        memory_bytes: What each executable is said to take, for tests of the memory budget.
        before: Called with what is compiled next, in the thread that does; may wait, as a slow
            compiler does, or raise, as a compiler does that fails.

    Attributes:
        made: What was compiled, in that order.

    Example:
        >>> import numpy as np
        >>> from cudagraph_jax import CUDAGraphConfig, CUDAGraphManager, bucket_jit
        >>> compiler = FakeCompiler()
        >>> config = CUDAGraphConfig(capture_sizes=(4,), capture_seq_lens=(8,))
        >>> manager = CUDAGraphManager(config, compiler=compiler)
        >>> double = bucket_jit(
        ...     lambda x: x * 2, in_axes="batch seq", manager=manager, name="double"
        ... )
        >>> double(np.ones((3, 5), np.float32)).shape
        (3, 5)
        >>> compiler.made
        [FakeCompile(name='double', bucket=Bucket(batch_size=4, seq_len=8))]
    """

    def __init__(
        self,
        *,
        runs: bool = False,
        memory_bytes: int = 0,
        before: Callable[[FakeCompile], object] | None = None,
    ) -> None:
        self._runs = runs
        self._memory_bytes = memory_bytes
        self._before = before
        self._made: list[FakeCompile] = []

    def __repr__(self) -> str:
        return f"FakeCompiler({len(self._made)} made)"

    @property
    def made(self) -> list[FakeCompile]:
        """What was compiled, in that order."""
        return list(self._made)

    def __call__(
        self, request: CompileRequest, lowering: Lowering, *, clock: Callable[[], float]
    ) -> Executable:
        """An executable that XLA has not seen; called by the manager.

        Raises:
            CaptureError: `before` raised.
        """
        made = FakeCompile(request.program.target.name, request.bucket)
        start = clock()
        self._ask(made)
        self._made.append(made)
        call = _Fake(request, lowering, runs=self._runs)
        return Executable(
            call=cast(Compiled, call),
            output_info=lowering.output_info,
            compile_ms=lowering.took_ms + (clock() - start) * 1e3,
            memory=Memory(self._memory_bytes, closed_over_bytes=lowering.closed_over_bytes),
            flops=None,
        )

    def _ask(self, made: FakeCompile) -> None:
        if self._before is None:
            return
        try:
            self._before(made)
        except CUDAGraphError:
            raise
        except Exception as error:
            raise CaptureError(
                f"cannot compile {made.name} {made.bucket}: {type(error).__name__}: "
                f"{error_text(error)}",
                stage="compile",
            ) from error


class _Fake:
    """What `jax.stages.Compiled` is to a bucket."""

    def __init__(self, request: CompileRequest, lowering: Lowering, *, runs: bool) -> None:
        self.out_info = lowering.output_info
        self._inputs = request.program.arguments(request.bucket)
        self._structure = jax.tree.structure(self._inputs)
        self._function = request.program.target.function if runs else None
        self._donated = request.program.target.donate_argnums

    def __call__(self, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        self._refuse(args, kwargs)
        outputs = self._zeros() if self._function is None else self._run(args, kwargs)
        for leaf in jax.tree.leaves([args[position] for position in self._donated]):
            if isinstance(leaf, jax.Array):
                leaf.delete()
        return outputs

    def _run(self, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]) -> PyTree:
        assert self._function is not None
        args, kwargs = jax.tree.map(jnp.asarray, (args, kwargs))
        return jax.tree.map(jnp.asarray, self._function(*args, **kwargs))

    def _zeros(self) -> PyTree:
        return jax.tree.map(_zeros, self.out_info)

    def _refuse(self, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]) -> None:
        """Raises where the arguments are not what was compiled, as an executable does."""
        if has_tracers(args, kwargs):
            raise TypeError("an executable takes no tracers")
        structure: object = jax.tree.structure((args, kwargs))
        if structure != self._structure:
            raise TypeError("the arguments are another pytree than what was compiled")
        for leaf, info in zip(
            jax.tree.leaves((args, kwargs)), jax.tree.leaves(self._inputs), strict=True
        ):
            shape, dtype = np.shape(leaf), _dtype(leaf)
            if shape != info.shape or dtype != info.dtype:
                compiled = f"{info.dtype}{list(info.shape)}"
                raise TypeError(f"an argument is {dtype}{list(shape)}, compiled for {compiled}")


def _dtype(leaf: PyTree) -> Any:
    """The dtype as which an executable sees a leaf."""
    if jnp.issubdtype(dtype := jnp.result_type(leaf), jax.dtypes.extended):
        return dtype
    return jax.dtypes.canonicalize_dtype(dtype)


def _zeros(info: Any) -> jax.Array:
    if jnp.issubdtype(info.dtype, jax.dtypes.extended):
        raise CaptureError("zeros are no PRNG keys: use FakeCompiler(runs=True)", stage="warm-up")
    array: jax.Array = jax.device_put(np.zeros(info.shape, info.dtype))
    return array
