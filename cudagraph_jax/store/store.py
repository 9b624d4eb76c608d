"""`GraphStore`: a directory of executables that outlives the processes that compiled them."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from cudagraph_jax._base.changes import counted
from cudagraph_jax._base.checks import count, names_nearest, require_choice
from cudagraph_jax._base.text import Json
from cudagraph_jax.errors import ConfigError, StoreError
from cudagraph_jax.store.entries import (
    as_miss,
    entry_names,
    is_entry,
    is_of_newer_format,
    problem_in,
    problem_of,
    put_aside,
    read_entry,
    read_file,
)
from cudagraph_jax.store.folder import Files, Folder, checked_key, no_directory, not_written, opened
from cudagraph_jax.store.format import Header, pack
from cudagraph_jax.store.hot import MANIFEST, Hot, add_to_manifest, read_manifest
from cudagraph_jax.store.identity import Identity, differences, file_name, in_words, plain
from cudagraph_jax.store.locks import LOCK, checked_timeout, held, is_exiting
from cudagraph_jax.store.maintenance import beside, checked, nearest, prune, records
from cudagraph_jax.store.outcomes import (
    Beside,
    Checked,
    Miss,
    MissReason,
    Near,
    Pruned,
    Record,
    Stored,
    UnusableError,
)

_MANIFEST_WAIT_S = 2.0
"""Who writes the hot buckets has the lock for milliseconds."""


class GraphStore:
    """A directory with one file per executable.

    A file is there whole or not at all, however its writer ended, and is checked over its whole
    length before any of it is used. Any number of threads and processes may share the directory.
    Each operation looks at the directory anew: it may be deleted, or put right, at any time.

    Args:
        path: The directory, or a link to it; made with mode 0700 if there is none. `~` is the home.
        mode: `"rw"`, or `"ro"`: nothing in the directory is ever written, moved or removed.
        key: At least 16 random bytes that are kept elsewhere. Files are then authenticated with
            HMAC-SHA-256, and so may lie where others can write; files of another key are misses.
        patience_s: The longest that one process waits for another that compiles the same, in
            seconds; then it compiles for itself, and waits for nobody again.
        clock: Seconds since the epoch, for times of last use and for ages.
        files: The system calls.

    Attributes:
        path: The directory, absolute.
        mode: `"rw"` or `"ro"`.
        patience_s: The longest wait.

    Raises:
        ConfigError: An argument is not of its kind.
        StoreError: The directory cannot be made or read, or, without a key, others can change it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     len(GraphStore(path))
        0
    """

    @names_nearest
    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: Literal["rw", "ro"] = "rw",
        key: bytes | None = None,
        patience_s: float = 120.0,
        clock: Callable[[], float] = time.time,
        files: Files | None = None,
    ) -> None:
        require_choice("mode", mode, ("rw", "ro"))
        self.path = _absolute(path)
        self.mode = mode
        self.patience_s = checked_timeout(patience_s, name="patience_s")
        self._key = checked_key(key)
        self._clock = checked_clock(clock)
        self._files = Files() if files is None else files
        self._counts = Counts()
        self._opened_at = time.time()
        self._waits = True
        if mode == "rw":
            _make(self.path)
        with self._opened():
            pass

    def get(self, identity: Identity, *, is_again: bool = False) -> Stored | Miss:
        """The executable with this identity, or why there is none.

        A truncated, corrupt or foreign file is moved aside (mode `"rw"`).

        Args:
            identity: What identifies it.
            is_again: Whether the same executable was just missed by another identity: a miss is
                then not counted again.

        Raises:
            ConfigError: `identity` holds what JSON cannot.
            StoreError: Others can change the directory or the file, and there is no key.
        """
        wanted = plain(identity, name="identity", nested=False)
        name = file_name(wanted)
        try:
            with self._opened() as folder:
                return self._get(folder, name, wanted, is_again=is_again)
        except UnusableError as problem:
            if not is_again:
                self._counts.miss(problem.reason)
            if problem.reason is MissReason.UNSAFE:
                raise
            return as_miss(name, problem)

    def put(
        self, identity: Identity, payload: bytes, *, extra: Mapping[str, Json] | None = None
    ) -> str:
        """Writes an executable, in place of one that is there.

        What a later version of this package wrote stays as it is: servers of that version read it.

        Args:
            identity: What identifies it.
            payload: Its bytes.
            extra: What else its header shall say; not compared by `get`.

        Returns:
            The file's name in the directory.

        Raises:
            ConfigError: `identity` or `extra` holds what JSON cannot, or `payload` is not bytes.
            StoreError: It cannot be written; the system's error is the cause, if there is one, and
                what was there is as it was.
        """
        if not isinstance(payload, bytes):
            raise ConfigError(f"payload of {type(payload).__name__} is not bytes: convert it")
        wanted = plain(identity, name="identity", nested=False)
        beside = plain({} if extra is None else extra, name="extra", nested=True)
        self._require_writable("put")
        pieces = pack(Header(wanted, beside, self._clock()), payload, key=self._key)
        name = file_name(wanted)
        with self._opened() as folder:
            if is_of_newer_format(folder, name):
                raise UnusableError(
                    f"{self.path / name} is of a newer format than this version of the package "
                    "writes, and left to those that read it: upgrade this one, or remove the file",
                    reason=MissReason.OUTDATED,
                )
            self._write(folder, name, pieces)
        return name

    def add_file(self, file: str, data: bytes) -> bool:
        """Puts a file that `file_bytes` of another directory gave, unless it is there whole.

        Args:
            file: Its name, which stays the same.
            data: Its bytes, verified as by `verify` before anything is written.

        Returns:
            Whether it was put: not where it is there already and would be loaded, nor where the
            file that is there is of a newer format.

        Raises:
            StoreError: It would not be loaded, or cannot be written.
        """
        self._require_writable("add_file")
        if (problem := problem_in(file, data, key=self._key)) is not None:
            raise StoreError(f"{file} is not put into {self.path}: {problem}")
        with self._opened() as folder:
            is_there = problem_of(folder, file, key=self._key) is None
            if is_there or is_of_newer_format(folder, file):
                return False
            self._write(folder, file, (data,))
        return True

    def touch(self, identity: Identity) -> bool:
        """Marks an executable as used now, so that `prune` keeps it; whether that was possible.

        `get` does so by itself. A server that runs for long does it for what it replayed.
        """
        name = file_name(plain(identity, name="identity", nested=False))
        if self.mode == "ro":
            return False
        with self._opened_or_none() as folder:
            return folder is not None and folder.mark_used(name, self._clock())

    def hot(self) -> dict[str, dict[str, int]]:
        """How often each bucket was replayed before, as `{"embed": {"8x128": 40}}`."""
        with self._opened_or_none() as folder:
            return {} if folder is None else read_manifest(folder)

    def remember_hot(self, hot: Hot) -> None:
        """Adds to how often the buckets of some functions were replayed.

        What several processes add adds up. Of these functions, what was written before this store
        was opened counts half from then on: once for servers that start together, so that what was
        hot long ago fades.

        Args:
            hot: How often since the last time.

        Raises:
            StoreError: It cannot be written.
        """
        self._require_writable("remember_hot")
        with self._held(MANIFEST, _MANIFEST_WAIT_S), self._opened() as folder:
            try:
                add_to_manifest(folder, hot, opened_at=self._opened_at)
            except OSError as error:
                raise StoreError(not_written(self.path / MANIFEST, error)) from error
            # Finer than what file systems write down by themselves.
            folder.mark_used(MANIFEST, time.time())

    def lock(
        self,
        identity: Identity,
        timeout_s: float,
        *,
        on_wait: Callable[[], object] = lambda: None,
    ) -> AbstractContextManager[bool]:
        """Excludes other processes that are about to compile the same executable.

        Whoever had to wait asks `get` again: it may have been put meanwhile. Without the package
        filelock, in mode `"ro"`, or where the system refuses, no lock is had and nobody waits.

        Args:
            identity: Of the executable.
            timeout_s: The longest wait, in seconds; 0: one try.
            on_wait: Called once if the lock is not free at once and is waited for.

        Returns:
            A context manager that gives whether the lock was had. It raises nothing of its own.
        """
        name = file_name(plain(identity, name="identity", nested=False))
        return self._held(name, checked_timeout(timeout_s), self._is_waiting_over, on_wait)

    def stop_waiting(self) -> None:
        """Ends every wait of a `lock` of this object at once, also of those to come.

        Who waited goes on without the lock, as when its time is up; a lock that is free is still
        had. So a server can end while another one compiles. When the interpreter exits, waits end
        by themselves.
        """
        self._waits = False

    def stats(self) -> dict[str, Any]:
        """Counts since the store was opened: hits, misses by reason, moved aside, written.

        An executable that is missed counts once, by the reason of the first look: one that has a
        fingerprint is looked up by that, and then by what it lowers to.
        """
        return self._counts.as_dict()

    def _get(
        self, folder: Folder, name: str, wanted: Mapping[str, Any], *, is_again: bool
    ) -> Stored | Miss:
        try:
            stored = read_entry(folder, name, key=self._key)
            if found := differences(stored.identity, wanted):
                message = f"it holds another executable, with {in_words(found)}"
                raise UnusableError(message, reason=MissReason.DIFFERS, differences=found)
        except UnusableError as problem:
            if problem.reason is MissReason.UNSAFE:
                raise
            moved = None
            if self.mode == "rw":
                with suppress(UnusableError):  # whatever keeps it from being moved, it is a miss
                    moved = put_aside(folder, name, problem)
            if moved is not None:
                self._counts.move_aside()
            if not is_again:
                self._counts.miss(problem.reason)
            return as_miss(name, problem, moved_to=moved)
        if self.mode == "rw":
            folder.mark_used(name, self._clock())
        self._counts.hit()
        return stored

    def _write(self, folder: Folder, name: str, pieces: Iterable[bytes]) -> None:
        try:
            folder.write(name, pieces)
        except OSError as error:
            raise StoreError(not_written(self.path / name, error)) from error
        folder.mark_used(name, self._clock())
        self._counts.write()

    @contextmanager
    def _held(
        self,
        name: str,
        timeout_s: float,
        is_over: Callable[[], bool] = lambda: False,
        on_wait: Callable[[], object] = lambda: None,
    ) -> Iterator[bool]:
        if not self._can_lock():
            yield False
            return
        path = self.path / f"{name}{LOCK}"
        waits = held(path, timeout_s=timeout_s, is_over=is_over, on_wait=on_wait)
        with waits as was_had:
            yield was_had

    def _is_waiting_over(self) -> bool:
        return not self._waits or is_exiting()

    def _can_lock(self) -> bool:
        if self.mode == "ro":
            return False
        try:
            # Not left to filelock, some of whose versions make the directory.
            with self._opened():
                return True
        except UnusableError:
            return False

    def ls(self) -> tuple[Record, ...]:
        """Every file by its header, sorted by name; nothing is verified but lengths."""
        with self._opened_or_none() as folder:
            return () if folder is None else records(folder)

    def verify(self) -> tuple[Checked, ...]:
        """Every file, read over its whole length, and why it would be a miss; nothing is moved."""
        with self._opened_or_none() as folder:
            return () if folder is None else checked(folder, key=self._key)

    def beside(self) -> Beside:
        """What lies in the directory beside the entries."""
        with self._opened_or_none() as folder:
            return Beside(put_aside=(), foreign=()) if folder is None else beside(folder)

    def read(self, file: str) -> Stored | Miss:
        """One file by the name that `ls` gives, verified as by `get`; neither counted nor moved."""
        try:
            with self._opened() as folder:
                if not is_entry(file):
                    raise UnusableError("it is no name of an entry", reason=MissReason.ABSENT)
                return read_entry(folder, file, key=self._key)
        except UnusableError as problem:
            return as_miss(file, problem)

    def file_bytes(self, file: str) -> bytes | Miss:
        """One file's own bytes by the name that `ls` gives, verified as by `verify`.

        `GraphStore.add_file` takes them in another directory with the same key.
        """
        with self._opened() as folder:
            if not is_entry(file):
                detail = "it is no name of an entry"
                return Miss(file=file, reason=MissReason.ABSENT, detail=detail)
            return read_file(folder, file, key=self._key)

    def nearest(
        self,
        identity: Identity,
        *,
        same: Collection[str] = ("name", "bucket"),
        besides: Collection[str] = (),
    ) -> Near | None:
        """The stored executable that differs least from an absent one; None without any.

        Args:
            identity: Of the absent one.
            same: The fields in which it must not differ.
            besides: Fields that are not compared. One that differs in nothing else is given, too.
        """
        wanted = plain(identity, name="identity", nested=False)
        return nearest(self.ls(), wanted, same=same, besides=besides)

    @names_nearest
    def prune(
        self,
        *,
        max_bytes: int | None = None,
        older_than: float | timedelta | None = None,
        dry_run: bool = False,
    ) -> Pruned:
        """Removes executables, those used least recently first, and what killed processes left.

        Args:
            max_bytes: How many bytes may stay; None: any number.
            older_than: Those that were not used for longer go: seconds, or a timedelta; None: none.
            dry_run: Whether only to say what would go.

        Raises:
            ConfigError: There is no limit, or one is negative or no number.
            StoreError: The mode is `"ro"` in a run that is not dry, or others can change the
                directory.
        """
        if max_bytes is None and older_than is None:
            raise ConfigError("prune has no limit: give max_bytes or older_than")
        limit = None if max_bytes is None else count("max_bytes", max_bytes)
        age_s = None if older_than is None else _seconds(older_than)
        if not dry_run:
            self._require_writable("prune")
        with self._opened_or_none() as folder:
            if folder is None:
                return Pruned(entries=(), leftovers=(), freed_bytes=0, kept_bytes=0)
            return prune(
                folder,
                now=self._clock(),
                max_bytes=limit,
                older_than_s=age_s,
                remove=(lambda _: True) if dry_run else folder.remove,
            )

    def __len__(self) -> int:
        with self._opened_or_none() as folder:
            return 0 if folder is None else len(entry_names(folder))

    def __contains__(self, identity: Identity) -> bool:
        """Whether there is a file for an identity, in whatever state."""
        name = file_name(plain(identity, name="identity", nested=False))
        with self._opened_or_none() as folder:
            return folder is not None and folder.status(name) is not None

    def __bool__(self) -> bool:
        """A store is one, empty or not."""
        return True

    def __repr__(self) -> str:
        key = "" if self._key is None else f", key=<{len(self._key)} bytes>"
        return f"{type(self).__name__}({str(self.path)!r}, mode={self.mode!r}{key})"

    @contextmanager
    def _opened(self) -> Iterator[Folder]:
        is_trusted = self._key is not None
        with opened(self.path, is_trusted=is_trusted, files=self._files) as folder:
            yield folder

    @contextmanager
    def _opened_or_none(self) -> Iterator[Folder | None]:
        """The folder, or None where it was deleted."""
        with ExitStack() as stack:
            folder = None
            try:
                folder = stack.enter_context(self._opened())
            except UnusableError as problem:
                if problem.reason is not MissReason.ABSENT:
                    raise
            yield folder

    def _require_writable(self, operation: str) -> None:
        if self.mode == "ro":
            raise StoreError(
                f'{self!r} is only read, but {operation} was called: open it with mode="rw"'
            )


def _absolute(path: object) -> Path:
    named = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(named, str) or not named:
        raise ConfigError(f"path={path!r:.80} is no path: give the directory of the store")
    if "\0" in named:
        raise ConfigError(f"path={path!r} has a NUL, which no path may have: leave it out")
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"path={path!r} has no home to stand for ~: write it out") from error


def _make(path: Path) -> None:
    try:
        # Those on the way, too, are their owner's alone, whatever the umask.
        missing = [place for place in (path, *path.parents) if not place.exists()]
        for place in reversed(missing):
            place.mkdir(mode=0o700, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(f"{no_directory(path)}: give another, or move it away") from error
    except OSError as error:
        raise StoreError(
            f"{path} cannot be made: {error.strerror or error}. Give a directory on a disk that "
            'can be written, or with mode="ro" one that is there'
        ) from error


def checked_clock(clock: object) -> Callable[[], float]:
    """The clock, of which every answer is looked at: no age can be told from one that is none.

    Raises:
        ConfigError: It is none; the one that is given raises that for what is no finite number.
    """
    if not callable(clock):
        raise ConfigError(
            f"clock={clock!r:.80} cannot be called: give a function, such as time.time"
        )

    def checked() -> float:
        now = clock()
        try:
            if not isinstance(now, bool) and math.isfinite(now):
                return float(now)
        except (TypeError, OverflowError):
            pass
        raise ConfigError(f"clock gives {now!r}: give seconds since the epoch, as time.time does")

    return checked


def _seconds(age: float | timedelta) -> float:
    seconds = age.total_seconds() if isinstance(age, timedelta) else age
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise ConfigError(
            f"older_than={age!r:.80} is no age: give seconds, 0 or more, or a timedelta"
        )
    return float(seconds)


class Counts:
    """Counts of a store, safe to change from many threads."""

    def __init__(self) -> None:
        self._hits = itertools.count()
        self._misses = {reason.value: itertools.count() for reason in MissReason}
        self._moved_aside = itertools.count()
        self._written = itertools.count()

    def hit(self) -> None:
        """An executable was found."""
        next(self._hits)

    def miss(self, reason: MissReason) -> None:
        """An executable was not found."""
        next(self._misses[reason.value])

    def move_aside(self) -> None:
        """A file was put aside."""
        next(self._moved_aside)

    def write(self) -> None:
        """An executable was written."""
        next(self._written)

    def as_dict(self) -> dict[str, Any]:
        """The counts as JSON can hold them; every reason is there."""
        return {
            "hits": counted(self._hits),
            "misses": {reason: counted(count) for reason, count in self._misses.items()},
            "moved_aside": counted(self._moved_aside),
            "written": counted(self._written),
        }
