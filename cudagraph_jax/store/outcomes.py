"""What a store answers with: what it found, or why it did not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from cudagraph_jax._base.text import error_text
from cudagraph_jax.errors import ConfigError, CUDAGraphError, StoreError
from cudagraph_jax.store.identity import Difference, in_words


class MissReason(Enum):
    """Why a file gives no payload."""

    ABSENT = "absent"
    """There is no such file, or no directory any more."""
    TRUNCATED = "truncated"
    """Its end is missing."""
    CORRUPT = "corrupt"
    """Its checksum is wrong, or its lengths cannot be."""
    FOREIGN = "foreign"
    """It is none of this package's files: a link, a device, or something else."""
    OUTDATED = "outdated"
    """It has another format version, older or newer."""
    NOT_AUTHENTIC = "not authentic"
    """The store's key did not write it, or the store has no key to tell."""
    DIFFERS = "differs"
    """It holds another executable than its name says."""
    UNREADABLE = "unreadable"
    """The system refuses to read it."""
    UNSAFE = "unsafe"
    """Somebody else may change it, and there is no key to notice that."""


SPOILED = frozenset({MissReason.TRUNCATED, MissReason.CORRUPT, MissReason.FOREIGN})
"""What is moved aside: such a file is of use to nobody who reads this directory.

One of another format version is: while servers are upgraded one by one, both share it.
"""


class UnusableError(StoreError):
    """A directory or a file that gives nothing.

    Attributes:
        reason: Why, in one word.
        differences: Where its identity is another one, with `MissReason.DIFFERS`.
        seen: Device and inode of the file that was opened; None if none was.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: MissReason = MissReason.UNSAFE,
        differences: tuple[Difference, ...] = (),
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.differences = differences
        self.seen: tuple[int, int] | None = None


@contextmanager
def fence(said: str) -> Iterator[None]:
    """Raises whatever goes wrong with a store as a `StoreError`, so that a request is served.

    The system may refuse anything, a file may state what nobody would write, and what is asked for
    may be nothing that a store takes. Errors of the function itself are none of the store's.

    Args:
        said: How the error begins.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, CUDAGraphError) and not isinstance(error, ConfigError):
            raise
        raise StoreError(f"{said}: {type(error).__name__}: {error_text(error)}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An executable that was found whole.

    Attributes:
        file: Its file's name in the directory.
        identity: What identifies it, as it was put.
        extra: What else was put beside the payload.
        payload: The bytes.
        written_at: When it was put, in seconds of the writer's clock.
        has_key: Whether a key authenticates it.
    """

    file: str
    identity: dict[str, Any]
    extra: dict[str, Any]
    payload: bytes = field(repr=False)
    written_at: float
    has_key: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """An executable that was not found, or not in a state to be used.

    Attributes:
        file: The name that its file has, or would have.
        reason: Why, in one word.
        detail: Why, in a sentence for the log.
        differences: The fields that differ, with `MissReason.DIFFERS`.
        moved_to: The name under which the file was put aside; None if it was left.
    """

    file: str
    reason: MissReason
    detail: str
    differences: tuple[Difference, ...] = ()
    moved_to: str | None = None

    def __str__(self) -> str:
        aside = "" if self.moved_to is None else f"; moved aside to {self.moved_to}"
        return f"{self.reason.value}: {self.detail}{aside}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A file as its header and the directory describe it; the payload is not read.

    Attributes:
        file: Its name in the directory.
        size_bytes: The whole file.
        used_at: When it was put or found last, in seconds of the clock of who did.
        identity: What identifies it; empty where `problem` says why.
        extra: What else was put beside the payload.
        payload_bytes: The payload alone.
        written_at: When it was put.
        has_key: Whether a key authenticates it.
        problem: Why the header cannot be read; None if it can.
    """

    file: str
    size_bytes: int
    used_at: float
    identity: dict[str, Any]
    extra: dict[str, Any]
    payload_bytes: int = 0
    written_at: float = 0.0
    has_key: bool = False
    problem: Miss | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What `verify` found about one file.

    Attributes:
        record: The file.
        problem: Why it would be a miss; None if it is whole.
    """

    record: Record
    problem: Miss | None

    @property
    def is_whole(self) -> bool:
        """Whether the file would be loaded."""
        return self.problem is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What `prune` removed.

    Attributes:
        entries: The executables, least recently used first.
        leftovers: Names of what killed writers, locks and bad files had left.
        freed_bytes: The size of all of it.
        kept_bytes: What entries and files put aside still take.
    """

    entries: tuple[Record, ...]
    leftovers: tuple[str, ...]
    freed_bytes: int
    kept_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What lies in a directory beside the entries.

    Attributes:
        put_aside: Names of what had to make way for entries.
        foreign: Names of what no store writes.
    """

    put_aside: tuple[str, ...]
    foreign: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """The stored executable that comes nearest to one that is absent.

    Attributes:
        record: Its file.
        differences: The fields that keep it from being the one.
    """

    record: Record
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        return f"the nearest stored one has {in_words(self.differences)}"
