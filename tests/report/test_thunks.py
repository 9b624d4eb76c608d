"""XLA's thunk sequences are read as XLA writes them."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax.report.thunks import Thunk, ThunkSequence, parse_thunks

DUMPS = Path(__file__).parent / "dumps"
PLAIN = """\
000: kKernel\t, kernel=fusion_1
001: kGemm  \tinfo
"""
NESTED = """\
004: kCommandBuffer\t
    000: kKernel\t
    001: kGemm  \t
002: kWhile        \t
condition:
      005: kKernel\t
body:
      008: kCommandBuffer\t
          006: kKernel\t
          007: kKernel\t
      009: kCustomCall   \t
003: kCopy         \t
"""


def test_without_command_buffers():
    """Each line with a number and a kind is a thunk."""
    assert parse_thunks(PLAIN) == ThunkSequence(0, (Thunk("kKernel", False), Thunk("kGemm", False)))


def test_what_is_nested():
    """What is nested in a command buffer is recorded; what is beside it in a loop is not."""
    found = parse_thunks(NESTED)
    assert found.command_buffers == 2
    assert found.thunks == (
        Thunk("kKernel", True),
        Thunk("kGemm", True),
        Thunk("kWhile", False),
        Thunk("kKernel", False, ("kWhile",)),
        Thunk("kKernel", True, ("kWhile",)),
        Thunk("kKernel", True, ("kWhile",)),
        Thunk("kCustomCall", False, ("kWhile",)),
        Thunk("kCopy", False),
    )


def test_a_recorded_loop():
    """All of a loop that is recorded as a whole is recorded."""
    text = "003: kCommandBuffer\t\n    002: kWhile\t\ncondition:\n          000: kKernel\t\nbody:\n"
    text += "          001: kGemm\t\n"
    assert parse_thunks(text).thunks == (
        Thunk("kWhile", True),
        Thunk("kKernel", True, ("kWhile",)),
        Thunk("kGemm", True, ("kWhile",)),
    )


def test_what_only_holds_others():
    """A sequence, or an end of what runs asynchronously, is no step of its own."""
    text = "000: kSequential\t\n    001: kCopy\t\n002: kAsyncStart\t\n    003: kCopy\t\n"
    assert parse_thunks(f"{text}004: kAsyncDone\t\n").thunks == (
        Thunk("kCopy", False, ("kSequential",)),
        Thunk("kCopy", False, ("kAsyncStart",)),
    )


def test_a_dump_of_xla():
    """What jaxlib 0.12 wrote for a `lax.scan` on an H100, with every scope's full options."""
    found = parse_thunks((DUMPS / "scan-full.txt").read_text(encoding="utf-8"))
    assert found.command_buffers == 2
    left = [thunk for thunk in found.thunks if not thunk.is_recorded]
    assert left == [Thunk("kWhile", False), Thunk("kCustomKernel", False, ("kWhile",))]
    assert Thunk("kCopy", True, ("kWhile", "kAsyncStart", "kDynamicSliceFusion")) in found.thunks
    assert len(found.thunks) == 14


@given(st.text())
def test_any_text(text):
    """Other text has no thunks, or some, and is no error."""
    parse_thunks(text)


@given(st.lists(st.sampled_from(["kKernel", "kGemm", "kCopy"])), st.integers(0, 3))
def test_every_thunk_is_counted_once(kinds, depth):
    """As many thunks are found as are written, at whatever depth."""
    text = "".join(f"{' ' * 4 * depth}{number:03}: {kind}\t\n" for number, kind in enumerate(kinds))
    assert [thunk.kind for thunk in parse_thunks(text).thunks] == kinds
