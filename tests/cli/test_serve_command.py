"""`cudagraph-jax serve`: a model's folder, asked as the page about serving asks."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cudagraph_jax.cli import main
from cudagraph_jax.demo import Encoder
from tests.helpers import sentence_folders
from tests.helpers.served import served

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
COMMAND = ["serve", "--port", "0", "--listener"]


@pytest.fixture(autouse=True)
def signals():
    """Gives back the handler that the command takes the place of."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def fails(capsys, *arguments):
    """What the command says when it fails."""
    # argparse ends the process itself.
    with contextlib.suppress(SystemExit):
        assert main(["serve", *arguments]) == 1
    return capsys.readouterr().err


def test_as_the_page_says(tmp_path):
    """OpenAI's client gets the encoder's vectors; a second start loads what the first compiled.

    It has the key of the store, which it only reads.
    """
    (code,) = re.findall(r"```\n(from openai.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    model = sentence_folders.write(tmp_path / "model")
    options = ["--model", str(model), "--name", "all-MiniLM-L6-v2"]
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    options += ["--store", str(tmp_path / "store"), "--key-file", str(key), "--store-mode"]
    for mode in ("rw", "ro"):
        with served(*options, mode, command=COMMAND) as server:
            names: dict = {}
            exec(code.replace("http://127.0.0.1:8000", server.url), names)
            stats = server.get("/stats").json()["function"]["registry"]
            server.terminate()
            status, said = server.ended()
            assert status == 0
    assert (stats["capture_count"], stats["load_count"]) == (0, stats["num_graphs"])
    texts = ["How do I sort an array?", "solve a system of linear equations"]
    found = np.array([one.embedding for one in names["answer"].data])
    np.testing.assert_allclose(found, Encoder(model=model).embed(texts), atol=1e-5)
    requests = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert any(one.get("texts") == 2 for one in requests)


def test_a_planned_grid(tmp_path):
    """With a trace the buckets are fitted to its texts, up to the model's limit."""
    model = sentence_folders.write(tmp_path / "model")
    trace = tmp_path / "texts.csv"
    trace.write_text("tokens\n" + "7\n" * 50 + "9\n" * 20 + "500\n")
    with served("--model", str(model), "--plan", str(trace), command=COMMAND) as server:
        graphs = server.get("/stats").json()["function"]["registry"]["graphs"]
    lengths = {int(bucket.split("x")[1]) for bucket in graphs}
    assert lengths == {9, sentence_folders.LIMIT}


@pytest.mark.slow  # two processes start, one behind the other
def test_workers(tmp_path, capfd):
    """Several processes serve one model, and end together."""
    options = ["--model", str(sentence_folders.write(tmp_path / "model"))]
    options += ["--store", str(tmp_path / "store"), "--workers", "2", "--port"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with served(command=["serve", *options], address=address) as server:
        server.terminate()
        assert server.ended()[0] == 0
    assert re.search(r"INFO worker \d+: warm", capfd.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "70000"], "no port"),
        (["--port", "x"], "no port"),
        (["--timeout", "-1"], "no number of seconds"),
        (["--timeout", "0"], "timeout_s=0.0 answers nobody"),
        (["--workers", "0"], "no whole number"),
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere cannot be read"),
        (["--workers", "2", "--key-file", "/dev/null"], "/dev/null is read by each of --workers 2"),
        (["--workers", "2", "--api-key-file", "/dev/null"], "give a file, not a pipe"),
        (["--host", "256.0.0.1"], "cannot listen on host"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--store-mode", "ro"], "and there is none: add --store DIR"),
        (["--key-file", "/nowhere"], "and there is none: add --store DIR"),
        (["--store", "/nowhere", "--store-mode", "ro"], "there is no directory /nowhere"),
        (["--store", "/", "--key-file", "/nowhere"], "--key-file /nowhere cannot be read"),
        (["--plan", "/nowhere.csv"], "/nowhere.csv cannot be read"),
    ],
)
def test_arguments_that_cannot_be(arguments, says, capsys):
    """Each is refused with what to do, before anything is captured."""
    assert says in fails(capsys, "--port", "0", *arguments)


@pytest.mark.parametrize("key", ["", "two\nlines", "k" * 5000, "\N{SNOWMAN}"])
def test_a_key_that_is_none(key, tmp_path, capsys):
    path = tmp_path / "key"
    path.write_text(key)
    assert "holds no key" in fails(capsys, "--port", "0", "--api-key-file", str(path))


def test_an_address_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "Give another" in fails(capsys, "--port", port)


def test_without_its_extra():
    """What is missing and what to install stands in one line."""
    code = "import sys; sys.modules['starlette'] = None\n"
    code += "from cudagraph_jax.cli import main; sys.exit(main(['serve']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'cudagraph-jax[serve]'" in done.stderr
    assert done.stderr.count("\n") == 1
