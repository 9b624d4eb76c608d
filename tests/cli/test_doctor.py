"""`cudagraph-jax doctor`."""

import dataclasses
import json

from cudagraph_jax.cli import main
from cudagraph_jax.cli.checkup import Devices, Extra, Finding, Snapshot, findings
from cudagraph_jax.cli.doctor_command import doctor_dict, doctor_text
from tests.helpers.processes import run_script, said_by

SNAPSHOT = Snapshot(
    versions={"jax": "0.12.0", "jaxlib": "0.12.0"},
    backend="gpu",
    devices=(Devices(kind="NVIDIA H100", count=2, memory_bytes=60 * 2**30),),
    gpus=("NVIDIA H100", "NVIDIA H100"),
    cpu_count=16,
    scopes={"FULL": None},
    commands={
        "CUBLAS": "INVALID_ARGUMENT: … is not a valid enum value.",
        "HOST_EXECUTE": "no room",
    },
    compiles_reported=True,
    settings={"jax_enable_x64": False},
    environment={"XLA_FLAGS": "--a=1"},
    extras=(
        Extra(name="plot", missing=("matplotlib",), install="pip install 'cudagraph-jax[plot]'"),
        Extra(name="rich", missing=(), install="pip install 'cudagraph-jax[rich]'"),
    ),
)
TEXT = """\
Versions
jax     0.12.0
jaxlib  0.12.0

Machine
backend      gpu
devices      2 x NVIDIA H100, 60.0 GiB for XLA on each
NVIDIA GPUs  NVIDIA H100, NVIDIA H100
CPU cores    16
XLA_FLAGS    --a=1
store        graphs: 3 executables

Command-buffer options
option        this jaxlib  its words
scope FULL    accepted
CUBLAS        unknown
HOST_EXECUTE  refused      no room

JAX
jax_enable_x64         False
compiles are reported  yes

Extras
plot  matplotlib missing: pip install 'cudagraph-jax[plot]'
rich  installed

Nothing looks wrong."""


def test_text():
    """Everything stands in tables."""
    assert doctor_text(SNAPSHOT, (), store="graphs: 3 executables") == TEXT


def test_text_of_findings():
    """What looks wrong stands at the end, with what to do."""
    found = [Finding("this is wrong", "do that"), Finding("and this", "x")]
    text = doctor_text(SNAPSHOT, found, store="")
    assert text.endswith("\n\nWhat looks wrong\n- this is wrong: do that\n- and this: x")


def test_text_without_a_backend():
    """Where JAX cannot start the tables hold what is known."""
    bare = Snapshot(
        versions={"jax": "0.12.0", "jaxlib": "0.12.0"},
        backend=None,
        backend_error="no",
        cpu_count=2,
    )
    text = doctor_text(bare, findings(bare), store="")
    assert "backend      none: JAX cannot start" in text
    assert "compiles are reported  unknown" in text
    assert "Command-buffer options" not in text


def test_json_of_findings():
    """JSON can hold all of it."""
    written = json.loads(json.dumps(doctor_dict(SNAPSHOT, [Finding("wrong", "do")], store="")))
    assert written["findings"] == [{"what": "wrong", "remedy": "do"}]
    assert written["devices"][0]["memory_bytes"] == 60 * 2**30
    assert written["extras"][0]["missing"] == ["matplotlib"]
    assert written["commands"] == SNAPSHOT.commands
    assert set(written) == {field.name for field in dataclasses.fields(Snapshot)} | {
        "findings",
        "store",
    }


def test_command(tmp_path, capsys):
    """The exit status says whether something looks wrong, and the file holds what was printed."""
    path = tmp_path / "doctor.json"
    status = main(["doctor", "--json", str(path)])
    printed = capsys.readouterr().out
    written = json.loads(path.read_text())
    assert status == bool(written["findings"])
    assert ("Nothing looks wrong." in printed) == (not written["findings"])
    assert "scope FULL" in printed


def test_unwritable(tmp_path, capsys):
    """A file that cannot be written is told at once."""
    assert main(["doctor", "--json", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "is no ordinary file: give the name of a file to write" in printed.err


def test_a_setting_that_is_wrong():
    """A process with a wrong setting ends with 1 and is told what to do."""
    script = (
        "import sys, jax\n"
        "jax.config.update('jax_debug_nans', True)\n"
        "from cudagraph_jax.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    done = run_script(script, warnings="error")
    assert (done.returncode, done.stderr) == (1, "")
    assert "- jax_debug_nans is on" in done.stdout


def test_without_optional_dependencies():
    """The doctor needs none of the extras, and prints the command for each that is missing."""
    script = (
        "import sys\n"
        "for name in ('rich', 'tokenizers', 'safetensors', 'matplotlib', 'prometheus_client'):\n"
        "    sys.modules[name] = None\n"
        "from cudagraph_jax.cli import main\n"
        "main(['doctor'])"
    )
    printed = said_by(script)
    assert "matplotlib missing: pip install 'cudagraph-jax[plot]'" in printed
    assert "rich, safetensors, tokenizers missing: pip install 'cudagraph-jax[demo]'" in printed
