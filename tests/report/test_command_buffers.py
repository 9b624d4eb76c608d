"""What is recorded is shown as figures, text and HTML, with the reasons for what is not."""

import json

from cudagraph_jax.modes import CommandBufferScope
from cudagraph_jax.report.command_buffers import Inspection, Outside, ScopeInspection
from cudagraph_jax.report.thunks import Thunk, ThunkSequence
from cudagraph_jax.shapes.ladder import Bucket

FULL = CommandBufferScope.FULL.compiler_options()
FOUND = ThunkSequence(1, (*[Thunk("kKernel", True)] * 3, Thunk("kFft", False)))
TEXT = """\
f 4x8 on gpu

scope  command buffers  recorded  outside  coverage  left outside
FULL                 1         3        1     75.0%  kFft 1

scope  thunk  number  why it is outside
FULL   kFft        1  XLA is not known to record thunks of this kind"""


def inspection(*scopes: ScopeInspection, platform: str = "gpu") -> Inspection:
    return Inspection("f", Bucket(4, 8), platform, scopes)


def test_figures():
    """Thunks are counted inside and outside of command buffers."""
    found = ScopeInspection.of("FULL", FULL, FOUND)
    assert (found.command_buffers, found.recorded, found.left, found.coverage) == (1, 3, 1, 0.75)
    assert found.outside == (Outside("kFft", 1, "XLA is not known to record thunks of this kind"),)
    assert ScopeInspection.of("NONE", {}, ThunkSequence(0, ())).coverage is None


def test_text():
    """A table has a line for each set of options, a second one the reasons."""
    found = inspection(ScopeInspection.of("FULL", FULL, FOUND))
    assert str(found) == TEXT
    assert repr(found) == "Inspection(f 4x8 on gpu: FULL 75.0%)"
    whole = inspection(ScopeInspection.of("FULL", FULL, ThunkSequence(1, FOUND.thunks[:3])))
    assert "why" not in str(whole)
    assert "100.0%" in str(whole)


def test_without_command_buffers():
    """Where there are none it says so."""
    found = inspection(platform="cpu")
    assert str(found) == (
        "f 4x8: XLA has no command buffers on cpu: a replay is a call of the compiled executable. "
        'Inspect it on a GPU, or for one: gpu="h100" in Python, --gpu h100 on the command line.'
    )
    assert repr(found) == "Inspection(f 4x8 on cpu: no command buffers)"
    assert "no command buffers on cpu" in found._repr_html_()


def test_html_is_escaped():
    """Names are data."""
    hostile = ScopeInspection.of("<b>", {}, FOUND)
    html = Inspection("<script>", Bucket(1, 1), "gpu", (hostile,))._repr_html_()
    assert "<script>" not in html
    assert "<b>" not in html
    assert "Left outside" in html
    assert (
        "Left outside"
        not in inspection(ScopeInspection.of("a", {}, ThunkSequence(0, ())))._repr_html_()
    )


def test_json():
    """It can be written as JSON."""
    found = json.loads(json.dumps(inspection(ScopeInspection.of("FULL", FULL, FOUND)).to_dict()))
    assert found["bucket"] == [4, 8]
    assert found["scopes"][0]["coverage"] == 0.75
    assert found["scopes"][0]["outside"][0]["kind"] == "kFft"


def test_reasons_of_one_kind():
    """Thunks of one kind are counted apart where they are outside for different reasons."""
    thunks = (Thunk("kKernel", False), Thunk("kKernel", False, ("kWhile",)))
    found = ScopeInspection.of("FULL", FULL, ThunkSequence(0, thunks))
    assert [(kind.kind, kind.number) for kind in found.outside] == [("kKernel", 1), ("kKernel", 1)]
