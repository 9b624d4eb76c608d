"""`GraphStore`: a directory of executables that outlives the processes that compiled them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Literal

from cudagraph_jax.errors import ConfigError, StoreError
from cudagraph_jax.store.counts import Counts
from cudagraph_jax.store.directory import StoreDirectory
from cudagraph_jax.store.entries import as_miss, problem_in, problem_of, put_aside, read_entry
from cudagraph_jax.store.folder import Files, Folder
from cudagraph_jax.store.format import Header, pack
from cudagraph_jax.store.hot import MANIFEST, Hot, add_to_manifest, read_manifest
from cudagraph_jax.store.identity import Identity, Json, differences, file_name, in_words, plain
from cudagraph_jax.store.locks import LOCK, checked_timeout, held, is_exiting
from cudagraph_jax.store.outcomes import Miss, Reason, Stored, UnusableError
from cudagraph_jax.store.remedies import not_written

_MANIFEST_WAIT_S = 2.0
"""Who writes the hot buckets has the lock for milliseconds."""


class GraphStore(StoreDirectory):
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
        self.patience_s = checked_timeout(patience_s, name="patience_s")
        super().__init__(path, mode=mode, key=key, clock=clock, files=files)
        self._counts = Counts()
        self._opened_at = time.time()
        self._waits = True

    def get(self, identity: Identity, *, is_again: bool = False) -> Stored | Miss:
        """The executable with this identity, or why there is none.

        A truncated, corrupt, foreign or outdated file is moved aside (mode `"rw"`).

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
            if problem.reason is Reason.UNSAFE:
                raise
            return as_miss(name, problem)

    def put(
        self, identity: Identity, payload: bytes, *, extra: Mapping[str, Json] | None = None
    ) -> str:
        """Writes an executable, in place of one that is there.

        Args:
            identity: What identifies it.
            payload: Its bytes.
            extra: What else its header shall say; not compared by `get`.

        Returns:
            The file's name in the directory.

        Raises:
            ConfigError: `identity` or `extra` holds what JSON cannot, or `payload` is not bytes.
            StoreError: It cannot be written; the system's error is the cause, and what was there is
                as it was.
        """
        if not isinstance(payload, bytes):
            raise ConfigError(f"payload of {type(payload).__name__} is not bytes: convert it")
        wanted = plain(identity, name="identity", nested=False)
        beside = plain({} if extra is None else extra, name="extra", nested=True)
        self._require_writable("put")
        pieces = pack(Header(wanted, beside, float(self._clock())), payload, key=self._key)
        name = file_name(wanted)
        with self._opened() as folder:
            self._write(folder, name, pieces)
        return name

    def add_file(self, file: str, data: bytes) -> bool:
        """Puts a file that `file_bytes` of another directory gave, unless it is there whole.

        Args:
            file: Its name, which stays the same.
            data: Its bytes, verified as by `verify` before anything is written.

        Returns:
            Whether it was put: not where it is there already and would be loaded.

        Raises:
            StoreError: It would not be loaded, or cannot be written.
        """
        self._require_writable("add_file")
        if (problem := problem_in(file, data, key=self._key)) is not None:
            raise StoreError(f"{file} is not put into {self.path}: {problem}")
        with self._opened() as folder:
            if problem_of(folder, file, key=self._key) is None:
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
                raise UnusableError(message, reason=Reason.DIFFERS, differences=found)
        except UnusableError as problem:
            if problem.reason is Reason.UNSAFE:
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
