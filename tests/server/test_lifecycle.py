"""A server from its start to its end: it warms up, is ready, drains."""

import asyncio
import json
import logging
import signal
import subprocess
from contextlib import ExitStack

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from cudagraph_jax import CUDAGraphError
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.server import Limits, embeddings_app, run
from cudagraph_jax.server.process import listen
from tests.helpers.served import everything_from, post, served
from tests.helpers.tiny_encoder import TinyEncoder, expected, warm_encoder


def ready(client):
    response = client.get("/ready")
    return response.status_code, response.json()


def test_it_warms_up_as_it_starts(caplog):
    """A cold encoder is captured and sealed by the application, step by step; then it is ready."""
    caplog.set_level(logging.INFO, logger="cudagraph_jax.server")
    encoder, steps = TinyEncoder(), []
    app = embeddings_app(
        encoder, model="tiny", progress=lambda done, total, step: steps.append((done, str(step)))
    )
    assert ready(TestClient(app)) == (
        503,
        {
            "status": "not ready",
            "reason": "the server warms up: not begun; the ASGI server has to run the "
            "application's lifespan",
        },
    )
    with TestClient(app) as client:
        assert app.state.readiness.settled.wait(60)
        assert ready(client) == (200, {"status": "ready"})
        body = {"model": "tiny", "input": [7, 8]}
        (found,) = client.post("/v1/embeddings", json=body).json()["data"]
        np.testing.assert_allclose(found["embedding"], expected([7, 8]), atol=1e-6)
    assert (2, "compile 1x16") in steps
    assert "warm: 2 buckets compiled, 0 loaded" in caplog.text
    assert encoder.function.stats()["mode"] == "replay"
    assert ready(TestClient(app))[0] == 503  # it has drained
    with TestClient(app) as client:  # started anew
        assert ready(client)[0] == 200
        assert client.post("/v1/embeddings", json=body).status_code == 200
    encoder.batcher.close()


def test_before_it_is_warm():
    """Requests are refused with 503 and told when to try again; the process is alive."""
    client = TestClient(embeddings_app(TinyEncoder(), model="tiny"))
    response = client.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "not_ready"
    assert response.json()["error"]["type"] == "server_error"
    assert int(response.headers["retry-after"]) >= 1
    assert client.get("/health").status_code == 200


def test_sealed_elsewhere():
    """What was warmed up and sealed before is ready without a start of the application."""
    encoder = TinyEncoder()
    client = TestClient(embeddings_app(encoder, model="tiny"))
    assert ready(client)[0] == 503
    encoder.warmup()
    assert ready(client)[0] == 503
    encoder.function.seal()
    assert ready(client)[0] == 200


def test_a_warm_up_that_fails(caplog):
    """Then `/ready` says so, and the log alone says why: anybody may ask, and it may name files."""

    class Failing(TinyEncoder):
        def warmup(self, **options):
            raise ValueError("no memory\nfor this")

    encoder = Failing()
    app = embeddings_app(encoder, model="tiny")
    with TestClient(app) as client:
        assert app.state.readiness.settled.wait(60)
        status, said = ready(client)
    assert status == 503
    assert "the warm-up failed: the server's log says why" in said["reason"]
    assert "memory" not in said["reason"]
    assert "Traceback" in caplog.text
    assert "no memory" in caplog.text


def test_an_end_within_the_warm_up():
    """An application that ends while it warms up stops after the step that runs."""
    encoder = TinyEncoder()
    app = embeddings_app(
        encoder,
        model="tiny",
        progress=lambda *step: setattr(app.state.readiness, "is_draining", True),
    )
    with TestClient(app):
        assert app.state.readiness.settled.wait(60)
    assert app.state.readiness.failure is None
    assert encoder.function.registry.num_graphs == 1


def test_draining():
    """A server that drains answers what it accepted, and refuses what comes after that."""
    encoder = warm_encoder()
    app = embeddings_app(encoder, model="tiny")

    async def drain():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            encoder.hold()
            body = {"model": "tiny", "input": "a"}
            accepted = asyncio.ensure_future(client.post("/v1/embeddings", json=body))
            await asyncio.to_thread(encoder.entered.wait)
            app.state.readiness.is_draining = True
            refused = await client.post("/v1/embeddings", json=body)
            not_ready = await client.get("/ready")
            encoder.go.set()
            return await accepted, refused, not_ready

    accepted, refused, not_ready = asyncio.run(drain())
    encoder.batcher.close()
    assert (accepted.status_code, refused.status_code, not_ready.status_code) == (200, 503, 503)
    assert refused.json()["error"]["code"] == "draining"


def test_leaving():
    """Before it drains, requests are answered still, and connections end with their answers."""
    encoder = warm_encoder()
    app = embeddings_app(encoder, model="tiny")
    app.state.readiness.is_leaving = True
    client = TestClient(app)
    assert ready(client) == (503, {"status": "not ready", "reason": "the server drains"})
    response = client.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
    assert response.status_code == 200
    assert response.headers["connection"] == "close"
    encoder.batcher.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number):
    """What was accepted when the signal comes is answered, and the process ends with 0."""
    with served("--delay", "0.2") as server:
        connections = [server.send(post(b'{"model":"tiny","input":"a"}')) for _ in range(12)]
        half = server.send(post(b'{"model":"tiny",', length=28))
        server.wait_until_accepted(8)
        server.process.send_signal(number)
        half.sendall(b'"input":"a"}')
        answers = [everything_from(connection) for connection in (*connections, half)]
        status, said = server.ended()
    assert [answer.split(b"\r\n")[0] for answer in answers] == [b"HTTP/1.1 200 OK"] * 13
    assert status == 0
    assert said.endswith("drained\n")


def test_the_second_signal_ends_at_once():
    """Who cannot wait sends it again, a second later: what is not answered is cut off."""
    with served("--delay", "0.5") as server, ExitStack() as stack:
        content = post(b'{"model":"tiny","input":["a","b","c","d"]}')
        connections = [stack.enter_context(server.send(content)) for _ in range(40)]
        server.wait_until_accepted(80)
        server.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(timeout=1.2)
        server.terminate()
        answers = [everything_from(connection) for connection in connections]
        status, said = server.ended()
    # Twenty calls would take ten seconds.
    assert sum(b"200 OK" in answer for answer in answers) < 40
    assert said.endswith("drained\n")
    assert status == 0


def test_the_access_log_is_json():
    """Each request but probes is a line, with its own id or a new one, and what it asked for."""
    with served() as server:
        server.embed(headers={"x-request-id": "mine-7"})
        server.embed(headers={"x-request-id": "not\tfit"})
        server.get("/unknown?secret=1")
        for probe in ("health", "ready", "metrics"):
            server.get(f"/{probe}")
        server.terminate()
        _, said = server.ended()
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    first, second, third = (line for line in lines if line["status"] != 503)
    assert first.items() >= {"request_id": "mine-7", "status": 200, "texts": 1, "tokens": 5}.items()
    assert first.items() >= {"method": "POST", "client": "127.0.0.1", "truncated": 0}.items()
    assert first["ms"] > 0
    assert len(second["request_id"]) == 32
    assert third.items() >= {"path": "/unknown", "status": 404}.items()
    assert "secret" not in said


def test_a_free_port_is_told(caplog):
    """Whoever asks for port 0 finds in the log which it is."""
    with caplog.at_level(logging.INFO, logger="cudagraph_jax.server"), listen("127.0.0.1", 0) as at:
        assert f"listening on http://127.0.0.1:{at.getsockname()[1]}" in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": ""}, "model=''"),
        ({"model": None}, "model=None"),
        ({"api_key": ""}, "api_key is empty"),
        ({"max_waiting": 0}, "max_waiting=0"),
        ({"limits": {}}, r"limits=\{\} are no Limits"),
        ({"max_wating": 3}, "did you mean 'max_waiting'"),
    ],
)
def test_arguments_that_cannot_be(options, says, encoder):
    with pytest.raises(ConfigError, match=says):
        embeddings_app(encoder, **{"model": "tiny", **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_inputs": 0}, "max_inputs=0"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"truncate": 1}, "=1"),
    ],
)
def test_limits_that_cannot_be(options, says):
    with pytest.raises(ConfigError, match=says):
        Limits(**options)


def test_an_encoder_that_is_none():
    """What it lacks is named."""
    with pytest.raises(ConfigError, match="has no batcher, embedding_size, function, item"):
        embeddings_app("an encoder", model="tiny")  # type: ignore[arg-type]


def test_max_waiting_beside_limits(encoder):
    """It takes the place of that limit, and the others stay."""
    app = embeddings_app(encoder, model="tiny", max_waiting=1, limits=Limits(max_body_bytes=99))
    client = TestClient(app)
    many = client.post("/v1/embeddings", json={"model": "tiny", "input": ["a", "b"]})
    assert many.status_code == 200  # one text after the other
    large = client.post("/v1/embeddings", json={"model": "tiny", "input": "a" * 99})
    assert (large.status_code, large.json()["error"]["param"]) == (413, None)


def test_an_application_of_another_kind():
    with pytest.raises(ConfigError, match="embeddings_app made"):
        run(Starlette())


def test_an_address_that_is_taken(encoder):
    """It is said at once, with what to do."""
    app = embeddings_app(encoder, model="tiny")
    with served() as server, pytest.raises(CUDAGraphError, match="cannot listen on host"):
        run(app, port=server.address[1])
