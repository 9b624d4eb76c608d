"""What is done with a bucketed function beside calling it: warm-up, sealing, reports."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from cudagraph_jax._base.checks import positive_size
from cudagraph_jax.capture.capturer import Task
from cudagraph_jax.capture.registry import CUDAGraphRegistry
from cudagraph_jax.dispatch.manager import CUDAGraphManager
from cudagraph_jax.dispatch.planned import PlanOptions
from cudagraph_jax.shapes.pytrees import PyTree

if TYPE_CHECKING:
    from cudagraph_jax.planning.plan import BucketPlan
    from cudagraph_jax.report.explanation import Explanation
    from cudagraph_jax.report.progress import Callback
    from cudagraph_jax.report.report import Report
    from cudagraph_jax.report.warmup_report import WarmupReport


class Operated(ABC):
    """The part of a bucketed function that whoever runs a server uses.

    Attributes:
        manager: What decides and counts.
    """

    manager: CUDAGraphManager

    @abstractmethod
    def task_of(self, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> Task:
        """A call as the manager's dispatcher takes it."""

    @property
    def registry(self) -> CUDAGraphRegistry:
        """The captured buckets."""
        return self.manager.registry

    def warmup(
        self,
        *args: PyTree,
        progress: Callback | bool | None = None,
        workers: int = 1,
        **kwargs: PyTree,
    ) -> WarmupReport:
        """Captures the whole grid for arguments like these, then runs each bucket.

        Args:
            *args: Example arguments of any sizes: arrays, or `jax.ShapeDtypeStruct`. What is
                passed through is used in the runs, so give the real parameters.
            progress: None: a bar where rich is installed and stderr is a terminal, else log lines.
                False: nothing. A function: called with (done, total, bucket) after each step.
            workers: How many buckets XLA compiles at a time, at most. Order and limits are kept.
                With a store they are compiled one at a time, and several are loaded at once.
            **kwargs: Example keyword arguments.

        Returns:
            What became of each bucket, the largest first. A bucket that cannot be captured is
            reported, warned of, and served eagerly.

        Raises:
            InputShapeError: The arguments do not fit `in_axes`, or an output cannot be trimmed.
            SealedError: The manager's mode does not allow captures.
            ConfigError: The grid does not fit into the limits.

        Example:
            >>> import numpy as np, cudagraph_jax
            >>> config = cudagraph_jax.CUDAGraphConfig(capture_sizes=(1, 2), capture_seq_lens=(8,))
            >>> double = cudagraph_jax.bucket_jit(
            ...     lambda x: x * 2, in_axes="batch seq", config=config
            ... )
            >>> double.warmup(np.ones((1, 3), np.float32), progress=False).captured
            2
        """
        task = self.task_of(args, kwargs)
        # Here, because importing this package is to cost little.
        from cudagraph_jax.capture.grid import warm_grid
        from cudagraph_jax.report.progress import Progress

        return warm_grid(
            self.manager.dispatcher,
            task,
            progress=Progress(progress),
            workers=positive_size(workers, name="workers"),
        )

    def seal(self) -> None:
        """Captures nothing from now on."""
        self.manager.seal()

    def replan(
        self, *, max_graphs: int | None = None, **options: Unpack[PlanOptions]
    ) -> BucketPlan:
        """Plans the manager's grid from what was asked for; see `CUDAGraphManager.replan`."""
        return self.manager.replan(max_graphs=max_graphs, **options)

    def report(self, path: str | os.PathLike[str] | None = None) -> Report:
        """Everything that the manager knows; see `CUDAGraphManager.report`."""
        return self.manager.report(path)

    def stats(self) -> dict[str, Any]:
        """The manager's counts and times; see `CUDAGraphManager.stats`."""
        return self.manager.stats()

    def explain(self, *args: PyTree, **kwargs: PyTree) -> Explanation:
        """What a call with these arguments would do, and why; nothing is run or compiled.

        Raises:
            InputShapeError: The arguments do not fit `in_axes`, as in the call itself.

        Example:
            >>> import numpy as np, cudagraph_jax
            >>> config = cudagraph_jax.CUDAGraphConfig(capture_sizes=(4,), on_miss="eager")
            >>> double = cudagraph_jax.bucket_jit(
            ...     lambda x: x * 2, in_axes="batch seq", config=config, name="double"
            ... )
            >>> explanation = double.explain(np.ones((3, 5), np.float32))
            >>> explanation.mode, explanation.bucket
            (<CUDAGraphMode.NONE: 'none'>, Bucket(batch_size=4, seq_len=5))
        """
        from cudagraph_jax.dispatch.explain import explain

        return explain(self.manager.dispatcher, self.task_of(args, kwargs))
