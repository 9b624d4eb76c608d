"""Every error the package raises, in one tree.

    CUDAGraphError
    ├── ConfigError (ValueError)            a configuration that cannot be
    ├── BucketOverflowError (ValueError)    sizes outside the limits, and on_overflow="error"
    ├── InputShapeError (TypeError)         arguments that do not fit what was declared
    ├── CaptureError (RuntimeError)         a bucket that cannot be captured
    │   └── PaddingLeakError                the padding changes the real rows (debug_mode)
    ├── SealedError (RuntimeError)          a capture was needed where none is allowed
    ├── QueueFullError (RuntimeError)       as many items wait for a batcher as may
    ├── DeadlineError (TimeoutError)        an item whose deadline came before its answer
    ├── DistributedError (RuntimeError)     several processes that would not do the same
    ├── UnexpectedCompileError (RuntimeError)   something compiled inside no_compiles()
    ├── UnpicklableError (TypeError)        what belongs to one process, given to pickle
    └── StoreError (OSError)                the directory of persisted executables

Each derives from the built-in exception that a caller who has never heard of this package would
expect, and all of them from `CUDAGraphError`.
"""

from __future__ import annotations


class CUDAGraphError(Exception):
    """The root of every error that this package raises."""


class ConfigError(CUDAGraphError, ValueError):
    """A configuration value that is not valid, or not valid beside another one."""


class BucketOverflowError(CUDAGraphError, ValueError):
    """A batch or sequence beyond the limits while `on_overflow="error"`."""


class InputShapeError(CUDAGraphError, TypeError):
    """Arguments whose rank, sizes or dtypes do not fit what was declared, or that are deleted.

    Also a use of a `Padded` that would take its padding for real.
    """


class CaptureError(CUDAGraphError, RuntimeError):
    """A bucket could not be captured.

    Attributes:
        stage: The step that failed: `"trace"`, `"lower"`, `"compile"`, `"warm-up"`, `"check"`,
            `"run"` in a request, or `"budget"` where the bucket needs more than the whole memory
            budget.
    """

    def __init__(self, message: str, *, stage: str = "compile") -> None:
        super().__init__(message)
        self.stage = stage


class PaddingLeakError(CaptureError):
    """What is no part of a row, padding or other rows, changed its answer (`debug_mode`)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, stage="check")


class SealedError(CUDAGraphError, RuntimeError):
    """A capture was needed where the manager may not capture."""


class UnexpectedCompileError(CUDAGraphError, RuntimeError):
    """Something was traced or compiled inside `no_compiles()`."""


class QueueFullError(CUDAGraphError, RuntimeError):
    """As many items wait for a batcher as may.

    Attributes:
        retry_after_s: Seconds in which those that wait now are answered, as measured; 1 if unknown.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(CUDAGraphError, TimeoutError):
    """An item's deadline has passed, or would before its answer; it ran only if that came late."""


class DistributedError(CUDAGraphError, RuntimeError):
    """Several processes would not do the same, or one of them is gone, fails or is silent."""


class UnpicklableError(CUDAGraphError, TypeError):
    """What belongs to one process was to be pickled: compiled code, locks, threads."""


class StoreError(CUDAGraphError, OSError):
    """The directory of persisted executables cannot be used."""


class CUDAGraphWarning(UserWarning):
    """Something works, but not as fast as it was asked to: the message says why."""
