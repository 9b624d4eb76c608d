"""Several processes on one address."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cudagraph_jax.server import workers
from cudagraph_jax.server.process import listen
from cudagraph_jax.server.workers import supervise
from tests.helpers.served import served


def workers_of(server):
    """The ids of a server's workers."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    return set(map(int, children.read_text().split()))


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def requests_counted(server):
    """What the metrics of all workers say, whichever is asked."""
    text = server.get("/metrics").text
    lines = [line for line in text.splitlines() if "server_requests_total" in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if "embeddings" in line)


def test_workers():
    """They share an address and metrics; one that is killed is begun anew; all end together."""
    with served("--workers", "2") as server:
        first = workers_of(server)
        assert len(first) == 2
        assert {server.embed().status_code for _ in range(20)} == {200}
        wait_for(lambda: requests_counted(server) == 20)
        os.kill(min(first), signal.SIGKILL)
        assert {server.embed().status_code for _ in range(20)} <= {200}
        wait_for(lambda: len(workers_of(server) - first) == 1)
        server.wait_until_ready()
        server.terminate()
        status, _ = server.ended()
        assert status == 0
        wait_for(lambda: not any(map(lives, first)))


def test_their_parent_is_killed():
    """Workers without it drain and end."""
    with served("--workers", "2") as server:
        workers = workers_of(server)
        server.process.kill()
        wait_for(lambda: not any(map(lives, workers)))


def test_a_worker_that_cannot_serve(tmp_path):
    """Its error ends all, with a status that says so, and nothing is tried again."""
    tried = tmp_path / "tried"
    program = f"open({str(tried)!r}, 'a').write('x'); raise SystemExit(1)"
    command = [sys.executable, "-c", program]
    assert supervise(command, workers=1, listener=listen("127.0.0.1", 0)) == 1
    assert tried.read_text() == "x"


def test_pauses_before_a_worker_is_begun_anew(monkeypatch, tmp_path):
    """They grow with each crash, and a worker that lived for long starts again with the first."""
    now = 0.0
    monkeypatch.setattr("cudagraph_jax.server.workers.time.monotonic", lambda: now)

    def start():
        process = subprocess.Popen([sys.executable, "-c", "import os; os._exit(7)"], stdin=-1)
        process.wait()
        return process

    worker, pauses = workers.ServerProcess(start, str(tmp_path)), []
    for lived in (0, 0, 0, 3600):
        now += lived
        began, process = now, worker.process
        while worker.process is process:
            assert worker.look_after() is None
            now += 0.5
        pauses.append(now - began)
    worker.let_go()
    assert pauses == [1.5, 2.5, 4.5, 1.5]
