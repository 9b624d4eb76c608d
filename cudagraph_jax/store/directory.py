"""The directory of a store as a whole: what is in it, whether it is sound, and what goes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

from cudagraph_jax._base.checks import count, require_choice
from cudagraph_jax.errors import ConfigError, StoreError
from cudagraph_jax.store.entries import as_miss, entry_names, is_entry, read_entry, read_file
from cudagraph_jax.store.folder import Files, Folder, opened
from cudagraph_jax.store.identity import Identity, file_name, plain
from cudagraph_jax.store.maintenance import beside, checked, prune, records
from cudagraph_jax.store.nearest import nearest
from cudagraph_jax.store.outcomes import (
    Beside,
    Checked,
    Miss,
    Near,
    Pruned,
    Reason,
    Record,
    Stored,
    UnusableError,
)
from cudagraph_jax.store.remedies import no_directory
from cudagraph_jax.store.safety import checked_key


class StoreDirectory:
    """The files of a `GraphStore`, which describes the arguments."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: Literal["rw", "ro"] = "rw",
        key: bytes | None = None,
        clock: Callable[[], float] = time.time,
        files: Files | None = None,
    ) -> None:
        require_choice("mode", mode, ("rw", "ro"))
        self.path = _absolute(path)
        self.mode = mode
        self._key = checked_key(key)
        self._clock = clock
        self._files = Files() if files is None else files
        if mode == "rw":
            _make(self.path)
        with self._opened():
            pass

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
                    raise UnusableError("it is no name of an entry", reason=Reason.ABSENT)
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
                return Miss(file=file, reason=Reason.ABSENT, detail=detail)
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
                if problem.reason is not Reason.ABSENT:
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
        raise ConfigError(f"path={path!r} is no path: give the directory of the store")
    if "\0" in named:
        raise ConfigError(f"path={path!r} has a NUL, which no path may have: leave it out")
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"path={path!r} has no home to stand for ~: write it out") from error


def _make(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(f"{no_directory(path)}: give another, or move it away") from error
    except OSError as error:
        raise StoreError(
            f"{path} cannot be made: {error.strerror or error}. Give a directory on a disk that "
            'can be written, or with mode="ro" one that is there'
        ) from error


def _seconds(age: float | timedelta) -> float:
    seconds = age.total_seconds() if isinstance(age, timedelta) else age
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise ConfigError(f"older_than={age!r} is no age: give seconds, 0 or more, or a timedelta")
    return float(seconds)
