"""An executable that is wanted: a program at a bucket, with all that its compiling depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from cudagraph_jax.config import CUDAGraphConfig
from cudagraph_jax.program.outputs import Outputs
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.xla.stages import Executable, Lowering, stage_errors


class Wanted(NamedTuple):
    """What an entry needs.

    Attributes:
        program: What to compile.
        bucket: For which sizes.
        options: The compiler options.
        others: Further sizes of the grid, to find the outputs' axes by.
        pads_seq: Whether sequences are padded.
    """

    program: Program
    bucket: Bucket
    options: Mapping[str, str]
    others: Sequence[Bucket]
    pads_seq: bool

    def __str__(self) -> str:
        return f"{self.program.target.name} {self.bucket}"

    @property
    def grid(self) -> str:
        """What the axes of the outputs were found by, as text of bounded length."""
        text = repr((self.program.reference, tuple(self.others), self.pads_seq))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


Complete = tuple[Outputs, Executable]


def wanted_of(program: Program, bucket: Bucket, *, config: CUDAGraphConfig) -> Wanted:
    """What `program` needs at `bucket` under `config`."""
    return Wanted(
        program,
        bucket,
        options=config.xla_options(),
        others=config.buckets(seq_len=bucket.seq_len),
        pads_seq=config.capture_seq_lens is not None,
    )


class Compiler(Protocol):
    """Makes executables; a test may have one that does not take XLA's time."""

    def __call__(
        self, wanted: Wanted, lowering: Lowering, *, clock: Callable[[], float]
    ) -> Executable:
        """The executable of `lowering`, which is that of `wanted`.

        Raises:
            CaptureError: It could not be compiled.
        """


def xla(wanted: Wanted, lowering: Lowering, *, clock: Callable[[], float]) -> Executable:
    """The executable that XLA compiles."""
    return lowering.compile(compiler_options=wanted.options, clock=clock)


def compiled(wanted: Wanted, *, clock: Callable[[], float], compiler: Compiler = xla) -> Complete:
    """The executable that is wanted, compiled, and its outputs.

    Raises:
        CaptureError: Tracing, lowering or compiling failed.
        InputShapeError: An output that must be trimmed cannot be.
    """
    outputs, lowering = lowered(wanted, clock=clock)
    with stage_errors("compile", str(wanted)):
        return outputs, compiler(wanted, lowering, clock=clock)


def lowered(wanted: Wanted, *, clock: Callable[[], float]) -> tuple[Outputs, Lowering]:
    """The outputs of the executable that is wanted, and what to compile.

    Raises:
        CaptureError: Tracing or lowering failed.
        InputShapeError: An output that must be trimmed cannot be.
    """
    outputs = wanted.program.outputs(wanted.bucket, others=wanted.others)
    return outputs, wanted.program.lower(wanted.bucket, clock=clock)
