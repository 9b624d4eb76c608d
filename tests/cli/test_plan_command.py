"""`cudagraph-jax plan`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cudagraph_jax import BucketPlan, CUDAGraphConfig, plan_buckets
from cudagraph_jax.cli import main
from tests.helpers.processes import run_script

TRACE = Path(__file__).parents[2] / "../shared/data/azure_llm_2023_conv.csv"
FEW = ["--max-graphs", "2"]
LENGTHS = [3, 3, 5, 8, 8, 8, 13, 40]


@pytest.fixture
def trace(tmp_path):
    """A few requests with their batch sizes."""
    path = tmp_path / "trace.csv"
    rows = [f"{length},{1 + place % 3}" for place, length in enumerate(LENGTHS)]
    path.write_text("\n".join(["len,batch", *rows]) + "\n")
    return str(path)


@pytest.fixture
def plan(capsys):
    """Runs the command: its exit status, what it printed, and its errors."""

    def run(*arguments):
        status = main(["plan", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def pasted(printed):
    """The configuration that the printed code makes."""
    names: dict[str, CUDAGraphConfig] = {}
    exec(printed.split("The configuration to paste:")[1], names)
    return names["config"]


def test_plan(plan, trace):
    """It prints the plan, the comparison, the value of buckets, and code that makes its config."""
    status, out, err = plan(trace, "--column", "len", "--max-graphs", 3)
    expected = plan_buckets(LENGTHS, max_graphs=3)
    assert (status, err) == (0, "")
    assert str(expected) in out
    for part in ("this plan", "powers of two", "vLLM", "SGLang", "least waste"):
        assert part in out
    assert pasted(out) == CUDAGraphConfig.from_plan(expected)
    assert "put yours here" in out


def test_options(plan, trace):
    """The options are those of plan_buckets."""
    arguments = [trace, "--column", "len", "--batch-column", "batch", "--max-graphs", 6]
    options = ["--batch-multiple", 2, "--seq-multiple", 8, "--headroom", "5x50"]
    status, out, _ = plan(*arguments, *options)
    config = pasted(out)
    assert status == 0
    assert config.max_batch_size == 6
    assert config.max_seq_len == 56
    assert all(size % 2 == 0 for size in config.capture_sizes)
    assert all(size % 8 == 0 for size in config.capture_seq_lens)
    assert "put yours here" not in out


@pytest.fixture
def pairs(tmp_path):
    """A trace of translations as JSON lines."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"n": 1 + place % 3, "in": size, "out": 2 * size} for place, size in enumerate(LENGTHS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


NAMED = ["--axis", "batch=n", "--axis", "src=in", "--axis", "tgt=out"]


def test_axes(plan, pairs, tmp_path):
    """Any columns are axes of the plan, which is printed and written by their names."""
    path = tmp_path / "plan.json"
    options = ["--multiple", "src=8", "--multiple", "tgt=16", "--max-padding", 0.9]
    status, out, err = plan(pairs, *NAMED, "--max-graphs", 12, *options, "--json", path)
    sizes = [(1 + place % 3, size, 2 * size) for place, size in enumerate(LENGTHS)]
    expected = plan_buckets(
        sizes,
        axes=("batch", "src", "tgt"),
        max_graphs=12,
        multiples={"src": 8, "tgt": 16},
        max_padding=0.9,
    )
    assert (status, err) == (0, "")
    assert out.startswith(f"{expected}\n")
    assert "\nsrc    8, " in out
    assert pasted(out) == CUDAGraphConfig.from_plan(expected)
    written = json.loads(path.read_text())
    assert written.pop("held_out") is None
    assert CUDAGraphConfig.from_dict(written.pop("config")) == pasted(out)
    assert BucketPlan.from_dict(written) == expected


def test_a_budget_and_headroom_of_axes(plan, pairs, tmp_path):
    """A budget is kept to, and pasted; headroom is given for each axis by its name."""
    path = tmp_path / "plan.json"
    options = ["--headroom", "src=256", "--headroom", "batch=8", "--max-bucket-elements", 32768]
    status, out, err = plan(pairs, *NAMED, "--max-graphs", 12, *options, "--json", path)
    assert (status, err) == (0, "")
    expected = plan_buckets(
        [(1 + place % 3, size, 2 * size) for place, size in enumerate(LENGTHS)],
        axes=("batch", "src", "tgt"),
        max_graphs=12,
        headroom={"src": 256, "batch": 8},
        max_bucket_elements=32768,
    )
    assert max(expected.sizes["src"]) == 256
    assert pasted(out) == CUDAGraphConfig.from_plan(expected, max_bucket_elements=32768)
    assert json.loads(path.read_text())["config"]["max_bucket_elements"] == 32768


def test_axes_that_a_configuration_has(plan, pairs):
    """A plan over batch and seq alone, by whatever column, has a configuration to paste."""
    _, out, _ = plan(pairs, "--axis", "seq=out", "--max-graphs", 2)
    assert (
        pasted(out).capture_seq_lens
        == plan_buckets([2 * size for size in LENGTHS], max_graphs=2).seq_lens
    )
    assert "put yours here" in out
    _, named, _ = plan(pairs, "--axis", "batch=n", "--axis", "seq=in", "--max-graphs", 4)
    _, out, _ = plan(pairs, "--column", "in", "--batch-column", "n", "--max-graphs", 4)
    assert named == out


def test_axes_are_tried_on_the_rest(plan, pairs):
    """A plan over any axes is tried on the rows that it was not made from."""
    _, out, _ = plan(pairs, *NAMED, "--max-graphs", 4, "--fit-on", 0.5)
    assert "On the other 4 requests" in out
    assert "2 of 4 requests are larger than the largest bucket" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*NAMED, "--axis", "src=out"], "axes has 'src' twice: name each axis once"),
        (["--axis", "src=inn"], "'inn': did you mean 'in'?"),
        ([*NAMED, "--multiple", "srx=8"], "multiples has 'srx', which is no axis"),
        ([*NAMED, "--headroom", "srx=8"], "headroom has 'srx', which is no axis"),
        ([*NAMED, "--headroom", "src=8", "--headroom", "0.5"], "--headroom was given 2 times"),
        ([*NAMED, "--max-bucket-elements", "3"], "more than max_bucket_elements=3: leave it out"),
        (
            ["--axis", "src=in", "--batch-column", "n"],
            "--batch-column n goes with --column: write --axis batch=n beside the other axes",
        ),
    ],
)
def test_bad_axes(plan, pairs, arguments, expected):
    """What is wrong with an axis is one line that names it."""
    status, out, err = plan(pairs, *FEW, *arguments)
    assert (status, out) == (1, "")
    assert expected in err


def test_fit_on(plan, trace, tmp_path):
    """A plan from the first rows is tried on the rest, and says what would not fit."""
    path = tmp_path / "plan.json"
    arguments = [trace, "--column", "len", "--max-graphs", 2, "--fit-on", 0.5, "--json", path]
    status, out, _ = plan(*arguments)
    assert status == 0
    assert "from 4 requests" in out
    assert "On the other 4 requests" in out
    assert "2 of 4 requests are larger than the largest bucket" in out
    assert "--headroom" in out
    held_out = json.loads(path.read_text())["held_out"]
    assert (held_out["requests"], held_out["overflows"]) == (4, 2)
    assert {row["name"] for row in held_out["comparison"]} == {"powers of two", "vLLM", "SGLang"}
    _, out, _ = plan(*arguments, "--headroom", 40)
    assert "larger than" not in out


def test_json(plan, trace, tmp_path):
    """The file holds the plan, and a config that from_dict takes."""
    path = tmp_path / "plan.json"
    assert plan(trace, "--column", "len", "--max-graphs", 3, "--json", path)[0] == 0
    written = json.loads(path.read_text())
    expected = plan_buckets(LENGTHS, max_graphs=3)
    assert CUDAGraphConfig.from_dict(written.pop("config")) == CUDAGraphConfig.from_plan(expected)
    assert written.pop("held_out") is None
    assert written == json.loads(json.dumps(expected.to_dict()))


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PDF"])
def test_plot(plan, trace, tmp_path, suffix):
    """The figure is written in the form that its name says."""
    path = tmp_path / f"plan{suffix}"
    assert plan(trace, "--column", "len", "--max-graphs", 3, "--plot", path)[0] == 0
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".PDF": b"%PDF"}
    assert path.read_bytes().startswith(starts[suffix])


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_unwritable(plan, tmp_path, option):
    """A file that cannot be written is told before the trace is read."""
    path = tmp_path / "missing" / "plan.png"
    arguments = ["no such trace.csv", "--column", "len", "--max-graphs", 3, option, path]
    status, out, err = plan(*arguments)
    assert (status, out) == (1, "")
    assert err == (
        f"cudagraph-jax: path={str(path)!r} is in a folder that does not exist, {path.parent}: "
        "make the folder first, or give another path\n"
    )


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_files_are_left_alone(plan, tmp_path, option):
    """Where the trace cannot be read, no file is made and none is lost."""
    old, new, link = (tmp_path / name for name in ("old.png", "new.png", "link.png"))
    old.write_text("kept")
    link.symlink_to(new)
    for path in (old, new, link):
        arguments = [tmp_path / "none.csv", "--column", "len", "--max-graphs", 3, option, path]
        assert plan(*arguments)[0] == 1
    assert old.read_text() == "kept"
    assert not new.exists()
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ({"--json": "trace.csv"}, "TRACE and --json are the same file"),
        ({"--plot": "link.png"}, "TRACE and --plot are the same file"),
        ({"--json": "./plan.png", "--plot": "plan.png"}, "--json and --plot are the same file"),
    ],
)
def test_one_file_twice(plan, trace, tmp_path, monkeypatch, outputs, expected):
    """No output takes the place of the trace or of the other, whatever way they are named."""
    monkeypatch.chdir(tmp_path)
    Path("link.png").symlink_to(trace)
    before = Path(trace).read_bytes()
    options = [part for pair in outputs.items() for part in pair]
    status, out, err = plan(trace, "--column", "len", *FEW, *options)
    assert (status, out) == (1, "")
    assert expected in err
    assert "a file of its own" in err
    assert Path(trace).read_bytes() == before
    assert not Path("plan.png").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--plot", "plan.txt"], "plan.txt is no kind of picture"),
        (["--column", "lem"], "there is no column 'lem': did you mean 'len'? (len, batch)"),
        (["--fit-on", "0.1"], "--fit-on 0.1 of 8 rows is not one row: give a larger part"),
        (["--headroom", f"1{300 * '0'}.0"], "headroom"),
    ],
)
def test_errors(plan, trace, arguments, expected):
    """What is wrong is one line on stderr, and the exit status is 1."""
    status, out, err = plan(trace, "--column", "len", "--max-graphs", 3, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("cudagraph-jax: ")
    assert err.count("\n") == 1
    assert expected in err


def test_line_breaks_in_a_header(plan, tmp_path):
    """Whatever the columns are called, the error is one line."""
    path = tmp_path / "trace.csv"
    path.write_text('"a\nb\x1b[31m",c\n1,2\n')
    _, _, err = plan(path, "--column", "len", "--max-graphs", 3)
    assert err.count("\n") == 1
    assert "\x1b" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-graphs", "0"],
        ["--fit-on", "2"],
        [],
        FEW,
        [*FEW, "--axis", "src"],
        [*FEW, "--axis", "=in"],
        [*FEW, "--axis", "src=in", "--column", "in"],
        [*FEW, "--axis", "src=in", "--multiple", "src=0"],
        [*FEW, "--axis", "src=in", "--headroom", "src=0"],
        [*FEW, "--axis", "src=in", "--max-bucket-elements", "0"],
    ],
)
def test_usage(trace, arguments, capsys):
    """What argparse cannot understand ends with 2."""
    with pytest.raises(SystemExit, match="2"):
        main(["plan", trace, *arguments])
    assert "usage:" in capsys.readouterr().err


RUN = "\nimport sys; from cudagraph_jax.cli import main; sys.exit(main(sys.argv[1:]))"


def test_no_backend_and_no_display(trace, tmp_path):
    """Neither a JAX backend nor a display is needed, and pyplot is not imported."""
    code = "import atexit, sys; atexit.register(lambda: print('matplotlib.pyplot' in sys.modules))"
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "MPLBACKEND": "tkagg"}
    environment.pop("DISPLAY", None)
    options = ["--column", "len", "--max-graphs", 3, "--plot", tmp_path / "plan.png"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + RUN, "plan", *map(str, [trace, *options])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("False\n")


def test_matplotlib_is_missing(trace, tmp_path):
    """Without matplotlib the error is the command that installs it."""
    code = "import sys; sys.modules['matplotlib'] = None"
    options = ["--column", "len", "--max-graphs", 3, "--plot", tmp_path / "plan.png"]
    done = run_script(code + RUN, "plan", trace, *options, warnings="error")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("run pip install 'cudagraph-jax[plot]'\n")


def test_standard_input():
    """A dash reads CSV from the standard input."""
    arguments = ["plan", "-", "--column", "len", "--max-graphs", 2]
    done = run_script(RUN, *arguments, stdin="len\n5\n9\n", warnings="error")
    assert done.returncode == 0
    assert pasted(done.stdout).capture_seq_lens == (5, 9)


def test_closed_pipe():
    """Whoever reads the output may stop: there is no traceback."""
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "cudagraph_jax", "plan", "-", "--column", "len", *FEW],
            input="len\n5\n",
            env=environment,
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not TRACE.exists(), reason="the trace is not part of the package")
def test_azure(plan):
    """On a real trace 16 buckets waste 5.9 %, powers of two 30.3 % with 11."""
    arguments = [TRACE, "--column", "ContextTokens", "--max-graphs", 16]
    _, out, _ = plan(*arguments)
    assert "this plan           16   5.9%" in out
    assert "powers of two       11  30.3%" in out
    _, out, _ = plan(*arguments, "--fit-on", 0.5, "--headroom", 14050)
    assert "this plan           16   8.3%          0" in out.split("On the other 9,683")[1]
