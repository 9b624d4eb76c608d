"""What to compile: a program at a bucket, with all that its compiling depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.program.outputs import Outputs
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.stages import Executable, Lowering


class CompileRequest(NamedTuple):
    """What an entry needs.

    Attributes:
        program: What to compile.
        bucket: For which sizes.
        options: The compiler options.
        others: Further sizes of the grid, to find the outputs' axes by.
        searches: Whether the axes of outputs that nobody trims are found, too.
    """

    program: Program
    bucket: Bucket
    options: Mapping[str, str]
    others: Sequence[Bucket]
    searches: bool

    def __str__(self) -> str:
        return f"{self.program.target.name} {self.bucket}"

    def outputs(self, lowering: Lowering | None = None) -> Outputs:
        """The outputs, read off what was lowered, else by tracing.

        Raises:
            CaptureError: Tracing failed.
            InputShapeError: An output that must be trimmed cannot be.
        """
        return self.program.outputs(
            self.bucket,
            tree=None if lowering is None else lowering.output_info,
            others=self.others,
            searches=self.searches,
        )

    def lower(self, *, clock: Callable[[], float]) -> tuple[Outputs, Lowering]:
        """The outputs, and what to compile: one trace, and two more for a new program.

        Raises:
            CaptureError: Tracing or lowering failed.
            InputShapeError: An output that must be trimmed cannot be.
        """
        lowering = self.program.lower(self.bucket, clock=clock)
        return self.outputs(lowering), lowering


def request_for(
    program: Program, bucket: Bucket, *, config: CUDAGraphConfig, is_stored: bool = False
) -> CompileRequest:
    """What `program` needs at `bucket` under `config`.

    Args:
        program: What to compile.
        bucket: For which sizes.
        config: Compiler options, the grid and policies.
        is_stored: Whether a store keeps the outputs' axes, for servers of any policy.
    """
    return CompileRequest(
        program,
        bucket,
        options=config.xla_options(),
        others=config.buckets(seq_len=bucket.seq_len),
        # Who compares outputs, or joins pieces of them, needs axes that nobody trims by.
        searches=is_stored or config.debug_mode or config.on_overflow == "split",
    )


class Compiler(Protocol):
    """Makes executables in the place of XLA; a test may have one that takes no time."""

    def __call__(
        self, request: CompileRequest, lowering: Lowering, *, clock: Callable[[], float]
    ) -> Executable:
        """The executable of `lowering`, which is that of `request`.

        Raises:
            CaptureError: It could not be compiled.
        """
