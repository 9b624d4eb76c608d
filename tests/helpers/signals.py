"""Signals that come where a test wants them: between two steps, where Python handles them."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import CodeType, FrameType
from typing import Any

# Where the interpreter looks for signals (`CHECK_EVAL_BREAKER` in CPython's bytecodes).
_LOOKS = ("RESUME", "JUMP_BACKWARD", "CALL", "CALL_FUNCTION_EX", "CALL_KW")
_CLOSE_TO_THE_LOCKS = ("/cudagraph_jax/", "/threading.py", "/contextlib.py", "/weakref.py")


class SignalAt:
    """A trace function that acts where signals are handled, as a handler does.

    A point where the next step lies in another `try` than the one before is left out: the handler
    of a signal belongs to the one before, and a trace function to the next.

    Args:
        act: What the handler does; it may raise.
        number: At which point; None: at each.
        most: How often at one step of some code; None: whenever it is reached.
        files: In code whose file name contains one of these.
        skips: And none of these.

    Attributes:
        points: How many points there were.
    """

    def __init__(
        self,
        act: Callable[[], object],
        *,
        number: int | None = None,
        most: int | None = None,
        files: tuple[str, ...] = _CLOSE_TO_THE_LOCKS,
        skips: tuple[str, ...] = ("/tests/",),
    ) -> None:
        self.points = 0
        self._act = act
        self._number = number
        self._most = most
        self._acted: Counter[tuple[CodeType, int]] = Counter()
        self._files = files
        self._skips = skips

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        if not any(part in name for part in self._files) or any(x in name for x in self._skips):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        before = -1

        def step(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal before
            if event == "opcode":
                last, before = before, frame.f_lasti
                if last in _points(frame.f_code):
                    self._come((frame.f_code, last))
            return step

        return step

    def _come(self, step: tuple[CodeType, int]) -> None:
        self.points += 1
        is_asked = self._number is None or self.points == self._number + 1
        if is_asked and (self._most is None or self._acted[step] < self._most):
            self._acted[step] += 1
            self._act()


class _Points:
    """The steps of some code after which signals are handled."""

    def __init__(self, code: CodeType) -> None:
        bytecode = dis.Bytecode(code)
        entries: list[Any] = getattr(bytecode, "exception_entries", [])

        def handler(offset: int) -> int | None:
            return next((one.target for one in entries if one.start <= offset < one.end), None)

        offsets = [instruction.offset for instruction in bytecode]
        after = dict(itertools.pairwise(offsets))
        self._offsets = {
            step.offset
            for step in bytecode
            if step.opname in _LOOKS
            and (
                step.opname == "JUMP_BACKWARD"
                or handler(step.offset) == handler(after.get(step.offset, step.offset))
            )
        }

    def __contains__(self, offset: object) -> bool:
        return offset in self._offsets


@functools.cache
def _points(code: CodeType) -> _Points:
    return _Points(code)


def under_signals(trace: SignalAt, call: Callable[[], object]) -> BaseException | None:
    """What `call` raises in a thread of its own under `trace`; coverage traces this one."""

    def run() -> None:
        sys._getframe().f_trace_opcodes = True  # Python 3.12 asks when tracing begins
        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(None)

    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(run).exception(120)
    finally:
        pool.shutdown(wait=False)


def elsewhere(call: Callable[[], object]) -> Any:
    """What `call` gives in another thread, which has a minute for it."""
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    thread.join(60)
    assert answers, "it hangs"
    return answers[0]
