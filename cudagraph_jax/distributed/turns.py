"""What a process of a led job does, turn by turn, while its time and its links are watched."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import jax

from cudagraph_jax._base.fork import put_right_in_child
from cudagraph_jax._base.text import error_line
from cudagraph_jax.capture.peers import PEERS
from cudagraph_jax.distributed.link import Link, Message, encoded
from cudagraph_jax.errors import DistributedError
from cudagraph_jax.shapes.padding import Array
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.settings import ThreadSettings

_LONGEST_PULSE_S = 1.0
_JOIN_S = 0.5
_MOST_AHEAD = 16
"""Calls that another process is told and has not run: more would only wait there."""
_REASON_S = 0.5
_OVER = "it is over: end all processes of the job and start them again"


class Turn:
    """One thing to do.

    Attributes:
        run: Does it.
        due_at: When it has to be done; None before it has begun.
        reply: Gets its outputs, or its error.
    """

    __slots__ = ("due_at", "reply", "run")

    def __init__(self, run: Callable[[], PyTree]) -> None:
        self.run = run
        self.due_at: float | None = None
        self.reply: queue.SimpleQueue[tuple[PyTree, BaseException | None]] = queue.SimpleQueue()


class Turns:
    """Does one turn after the other in a thread of its own, and says within a time where one hangs.

    XLA waits for the other processes of a collective without a limit, and nothing interrupts it. So
    only a thread that can be left behind waits there; who asked waits for that thread, and for
    whatever the links tell.

    Args:
        links: To the other processes that are of interest.
        timeout_s: How long a turn may take, here and there, and another process may be silent.
        received: Called with each message of another process.
        clock: Seconds.
        thread: Makes the threads.

    Attributes:
        failure: Why nothing is done any more; None: all is well.
        is_closing: Whether nothing is begun any more.
    """

    def __init__(
        self,
        links: Sequence[Link],
        *,
        timeout_s: float,
        received: Callable[[Link, Message], None],
        clock: Callable[[], float] = time.monotonic,
        thread: Callable[..., threading.Thread] = threading.Thread,
    ) -> None:
        self._links, self._timeout_s = list(links), timeout_s
        self._received, self._clock = received, clock
        self.failure: DistributedError | None = None
        self._last_words: dict[str, Any] = {}  # whoever ends a link says why
        self.is_closing = False
        self._is_over = False  # so that the others may be gone
        self._over: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._ended: dict[Link, None] = {}
        self._turns: queue.SimpleQueue[Turn | None] = queue.SimpleQueue()
        self._pending: dict[Turn, None] = {}
        self._running: Turn | None = None
        # When the answer to each message is due that a process was told and has not done.
        self._due: dict[Link, deque[float]] = {link: deque() for link in links}
        self._room = {link: threading.Semaphore(_MOST_AHEAD) for link in links}
        self._stop: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._settings = ThreadSettings()
        jobs: dict[str, Callable[[], None]] = {"turns": self._work, "pulse": self._watch}
        jobs |= {f"from-{link.peer}": partial(self._read, link) for link in links}
        self._threads = [
            thread(
                target=partial(self._guard, name, job), name=f"cudagraph-jax-{name}", daemon=True
            )
            for name, job in jobs.items()
        ]
        put_right_in_child(self)

    def start(self) -> None:
        """Begins.

        Raises:
            RuntimeError: There are no threads for it; the others learn that.
        """
        try:
            for thread in self._threads:
                thread.start()
        except BaseException as error:
            self.fail(f"it cannot begin: {error_line(error)}", cause=error)
            self.close()
            raise

    def after_fork(self) -> None:
        """Does nothing in a child, whose parent has the threads and goes on."""
        self.failure = DistributedError("this process was forked from one of a led job: call there")
        for link in self._links:
            link.leave()
        self._links = []

    def do(self, run: Callable[[], PyTree]) -> PyTree:
        """What `run` gives in its turn.

        Raises:
            DistributedError: Another process failed or is gone, or somebody is late.
            Exception: What `run` raises.
        """
        turn = self.add(run)
        outputs, error = turn.reply.get()
        try:
            if error is not None:
                raise error
            return outputs
        finally:
            del error  # whose traceback leads back to this frame

    def add(self, run: Callable[[], PyTree]) -> Turn:
        """Has `run` done in its turn."""
        turn = Turn(run)
        self._pending[turn] = None  # before it is asked, so that a failure is not missed
        if self.failure is not None or self.is_closing:
            self._settle(turn, error=self.error())
        else:
            self._turns.put(turn)
        return turn

    def allow(self, seconds: float) -> None:
        """Lets the turn that runs take so long from now on."""
        if self._running is not None:
            self._running.due_at = self._clock() + seconds

    def tell(self, head: Mapping[str, Any], arrays: Sequence[Array], *, limit_s: float) -> None:
        """Tells all other processes what they have to do as well, within so many seconds.

        It waits while one of them is far behind, so that little is queued there.

        Raises:
            DistributedError: One of them could not be told; the others were.
        """
        data, problems = encoded(head, arrays), list[tuple[Link, OSError]]()
        for link in self._links:
            try:
                if not self._room[link].acquire(timeout=limit_s):
                    raise TimeoutError("it is far behind")
                self._due[link].append(self._clock() + limit_s)
                link.send(data)
            except OSError as error:
                problems.append((link, error))
        for link, problem in problems:
            raise self.fail(f"process {link.peer} cannot be told: {_reason(problem)}") from problem

    def has_done(self, link: Link) -> None:
        """Called when a process has done the first of the things that it has to do."""
        self._due[link].popleft()
        self._room[link].release()

    def error(self) -> DistributedError:
        """Why nothing is done any more, to raise."""
        # Each caller gets his own: raising one object in many threads would mix their tracebacks.
        return DistributedError(str(self.failure or "what was led is closed: lead it again"))

    def fail(self, why: str, *, cause: BaseException | None = None) -> DistributedError:
        """Ends all of it, here and there; what to raise."""
        if self.failure is None and not self._is_over:
            failure = DistributedError(f"{why.rstrip('. ')}: {_OVER}")
            failure.__cause__ = cause
            self._last_words = {"failed": why}
            self.failure = failure
            if self._links:
                PEERS.coordinator.break_off(str(failure))
            for turn in list(self._pending):
                self._settle(turn, error=self.error())
            self._turns.put(None)
            self._stop.put(None)
            self._say_last()
            self._over.put(None)
        return self.error()

    def fail_with(self, why: str, *, cause: BaseException) -> DistributedError:
        """As `fail`, for a call that failed here, unless that is because another process is gone.

        Of a collective all processes fail at once, and the links tell the reason in a moment.
        """
        deadline = self._clock() + _REASON_S
        while self.failure is None and self._clock() < deadline:
            time.sleep(_REASON_S / 50)
        return self.fail(f"{why}: {error_line(cause)}", cause=cause)

    def wait(self) -> None:
        """Waits for `finish`.

        Raises:
            DistributedError: All of it has failed.
        """
        self._over.get()
        if self.failure is not None:
            raise self.error() from self.failure.__cause__

    def wait_for_ends(self) -> None:
        """Waits until all other processes have said that they ended.

        Raises:
            DistributedError: One of them has not in time, or all of it has failed.
        """
        deadline = self._clock() + self._timeout_s
        while len(self._ended) < len(self._links) and self.failure is None:
            try:
                self._over.get(timeout=max(0.0, deadline - self._clock()))
            except queue.Empty:
                late = [str(link.peer) for link in self._links if link not in self._ended]
                self.fail(f"process {', '.join(late)} has not said in time that it ended")
        if self.failure is not None:
            raise self.error() from self.failure.__cause__

    def finish(self) -> None:
        """Tells the other processes that this is the end here."""
        self.is_closing = self._is_over = True
        self._last_words = self._last_words or {"ended": True}
        self._say_last()
        self._over.put(None)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Ends all of it with the block, which for the others has failed where it is left early."""
        try:
            yield
        except BaseException as error:
            self.fail("it was interrupted", cause=error)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Ends the threads; the one that is stuck is left behind."""
        self.is_closing = self._is_over = True
        self._turns.put(None)
        self._stop.put(None)
        self._say_last()
        # What the others said last is lost if the connection goes before it is read.
        deadline = self._clock() + _JOIN_S
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - self._clock()))
        for link in self._links:
            link.close()
        for turn in list(self._pending):
            self._settle(turn, error=self.error())

    def _say_last(self) -> None:
        # A caller who was woken by a failure may close all of it before `fail` has told everybody.
        data = encoded(self._last_words)
        for link in self._links:
            with suppress(OSError):  # of one that is gone
                link.send(data)
                link.end()

    def _settle(
        self, turn: Turn, outputs: PyTree = None, *, error: BaseException | None = None
    ) -> None:
        self._pending.pop(turn, None)
        turn.reply.put((outputs, error))

    def _work(self) -> None:
        PEERS.leads = threading.current_thread()
        with self._settings.applied(), jax.transfer_guard("allow"):
            while (turn := self._turns.get()) is not None:
                # Whoever asked for it came too late, or has his error already.
                if self.is_closing or self.failure is not None:
                    self._settle(turn, error=self.error())
                    continue
                turn.due_at = self._clock() + self._timeout_s
                self._running = turn
                try:
                    self._settle(turn, turn.run())
                except BaseException as error:
                    self._settle(turn, error=error)
                self._running = None
                del turn

    def _guard(self, name: str, job: Callable[[], None]) -> None:
        """Does what a thread is for, without which nothing goes on here."""
        try:
            job()
        except BaseException as error:
            self.fail(f"its thread {name} has failed: {error_line(error)}", cause=error)

    def _read(self, link: Link) -> None:
        try:
            while link not in self._ended:
                message = link.receive()
                if "failed" in message.head:
                    self.fail(f"process {link.peer} says: {message.head['failed']}")
                elif "ended" in message.head:
                    self._ended[link] = None
                    self._over.put(None)
                elif message.head:
                    self._received(link, message)
        except TimeoutError:
            self.fail(f"process {link.peer} has been silent for {self._timeout_s:g} s")
        except OSError as error:
            self.fail(f"process {link.peer} is gone: {_reason(error)}")

    def _watch(self) -> None:
        """Shows the others that this process lives, and looks whether anybody is late."""
        pulse_s = min(_LONGEST_PULSE_S, self._timeout_s / 5)
        while True:
            with suppress(queue.Empty):
                return self._stop.get(timeout=pulse_s)
            for link in self._links:
                if link in self._ended:
                    continue
                with suppress(OSError):  # what has become of it is read, behind what it said last
                    link.pulse()
                due = self._due[link]
                if due and due[0] < self._clock():
                    self.fail(f"process {link.peer} is late with what it was told to run")
            running = self._running
            if running is not None and (running.due_at or 0.0) < self._clock():
                self.fail(
                    f"a call has not ended in time (timeout_s={self._timeout_s:g}): another "
                    "process does not run the same, or it takes so long"
                )


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
