"""More than the server can answer: refused with what to do, and what was accepted is answered."""

import asyncio
import logging
import re
from typing import Any

import httpx
import numpy as np
import pytest

from cudagraph_jax.server import Limits, embeddings_app
from tests.helpers.tiny_encoder import SIZE, warm_encoder

BODY = {"model": "tiny", "input": "a"}


@pytest.fixture
def encoder():
    """One of its own, which is told to answer at the end."""
    encoder = warm_encoder()
    yield encoder
    encoder.go.set()
    encoder.batcher.close()


def asked_of(encoder, **limits):
    """A client of an application in this event loop."""
    app = embeddings_app(encoder, model="tiny", limits=Limits(**limits))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tiny")


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


def post(client, **options):
    return asyncio.ensure_future(client.post("/v1/embeddings", **{"json": BODY, **options}))


def test_a_full_queue(encoder):
    """With as many texts waiting as may, one more gets 429 and both headers; the others 200."""

    async def run():
        async with asked_of(encoder, max_waiting=3) as client:
            encoder.hold()
            first = post(client)
            await asyncio.to_thread(encoder.entered.wait)
            waiting = [post(client) for _ in range(3)]
            await until(lambda: encoder.batcher.waiting == 3)
            refused = await post(client)
            encoder.go.set()
            answered = [await one for one in (first, *waiting)]
            return answered, refused, await post(client, json={**BODY, "input": ["a"] * 4})

    answered, refused, many = asyncio.run(run())
    assert [one.status_code for one in answered] == [200] * 4
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) >= 1
    assert many.status_code == 200  # one text after the other


def test_a_request_is_accepted_whole_or_not_at_all(encoder):
    """Of a request that finds no room for all its texts none waits."""

    async def run():
        async with asked_of(encoder, max_waiting=4) as client:
            encoder.hold()
            first = post(client)
            await asyncio.to_thread(encoder.entered.wait)
            second = post(client)
            await until(lambda: encoder.batcher.waiting == 1)
            refused = await post(client, json={**BODY, "input": ["a"] * 4})
            waiting = encoder.batcher.waiting
            encoder.go.set()
            await first
            await second
            return refused, waiting

    refused, waiting = asyncio.run(run())
    assert refused.status_code == 429
    assert waiting == 1


def test_many_texts_leave_room_for_others(encoder):
    """Of a request of many only some wait at a time, so that one behind it is answered soon."""

    async def run():
        async with asked_of(encoder) as client:
            encoder.hold()
            many = post(client, json={**BODY, "input": ["a"] * 1000})
            await asyncio.to_thread(encoder.entered.wait)
            await until(lambda: encoder.batcher.waiting >= 60)
            waiting = encoder.batcher.waiting
            one = post(client)
            await until(lambda: encoder.batcher.waiting > waiting)
            encoder.go.set()
            found = await one
            return waiting, found.status_code, many.done(), await many

    waiting, status, was_done, many = asyncio.run(run())
    assert waiting <= 64
    assert status == 200
    assert not was_done
    assert len(many.json()["data"]) == 1000


def test_the_batcher_itself_is_full():
    """A batcher that takes fewer than the server refuses, and has the texts of one request wait."""
    encoder = warm_encoder(max_waiting=1)

    async def run():
        async with asked_of(encoder, max_waiting=10) as client:
            encoder.hold()
            first = post(client)
            await asyncio.to_thread(encoder.entered.wait)
            many = post(client, json={**BODY, "input": ["a", "b", "c"]})
            await until(lambda: encoder.batcher.waiting == 1)
            refused = await post(client)
            encoder.go.set()
            return [(await one).status_code for one in (first, many)], refused.status_code

    try:
        assert asyncio.run(run()) == ([200, 200], 429)
    finally:
        encoder.batcher.close()


def test_a_deadline_that_passes(encoder):
    """A request that is not answered in the time it names gets 504, and is not run."""

    async def run():
        async with asked_of(encoder) as client:
            encoder.hold()
            first = post(client)
            await asyncio.to_thread(encoder.entered.wait)
            late = post(client, headers={"x-request-timeout": "0.01"})
            await until(lambda: encoder.batcher.waiting == 1)
            await asyncio.sleep(0.02)
            encoder.go.set()
            return await first, await late

    first, late = asyncio.run(run())
    assert first.status_code == 200
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert late.json()["error"]["type"] == "server_error"
    assert sum(encoder.calls) == 1


def test_what_waits_takes_longer_than_a_request_has(encoder):
    """It is refused at once, instead of failing when its time is over."""

    async def run():
        async with asked_of(encoder) as client:
            encoder.batcher.figures.add_call(  # as if a text had taken ten seconds
                encoder.function.manager.config.buckets()[0],
                rows=1,
                real_elements=1,
                seconds=10.0,
            )
            encoder.hold()
            first = post(client)
            await asyncio.to_thread(encoder.entered.wait)
            hasty = await post(client, headers={"x-request-timeout": "2"})
            encoder.go.set()
            await first
            await until(lambda: not encoder.batcher.expected_s())
            return hasty, await post(client, headers={"x-request-timeout": "2"})

    hasty, alone = asyncio.run(run())
    assert hasty.status_code == 429
    assert "this request has 2" in hasty.json()["error"]["message"]
    # With nobody before it a request is tried, whatever calls took before.
    assert alone.status_code == 200


def test_a_client_that_goes_away(encoder):
    """Its texts are dropped before they run."""

    async def run():
        async with asked_of(encoder) as client:
            encoder.hold()
            first = post(client)
            await asyncio.to_thread(encoder.entered.wait)
            app = client._transport.app
            await ask_and_go(app, lambda: encoder.batcher.waiting == 1)
            waiting = encoder.batcher.waiting
            encoder.go.set()
            await first
            return waiting

    assert asyncio.run(run()) == 0
    assert sum(encoder.calls) == 1


async def ask_and_go(app, is_waiting):
    """A request whose client goes away while its text waits."""
    body = b'{"model": "tiny", "input": "gone"}'
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await until(is_waiting)
        return {"type": "http.disconnect"}

    sent = []

    async def send(message):
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/v1/embeddings",
        "raw_path": b"/v1/embeddings",
        "query_string": b"",
        "headers": [],
        "client": None,
        "server": None,
        "http_version": "1.1",
        "scheme": "http",
    }
    await app(scope, receive, send)
    return sent


def test_a_request_that_is_cancelled(encoder):
    """Where the server's own task is cancelled, its texts are dropped, too."""

    async def run():
        async with asked_of(encoder) as client:
            encoder.hold()
            first = post(client)
            await asyncio.to_thread(encoder.entered.wait)
            second = post(client)
            await until(lambda: encoder.batcher.waiting == 1)
            second.cancel()
            await until(lambda: encoder.batcher.waiting == 0)
            encoder.go.set()
            await first

    asyncio.run(run())


def test_a_body_beyond_the_limit(encoder):
    """It is refused by what it announces, or as soon as more came, and the connection ends."""

    async def run():
        async with asked_of(encoder, max_body_bytes=100) as client:

            async def chunks():
                for _ in range(5):
                    yield b" " * 50

            announced = await post(client, json={**BODY, "input": "a" * 200})
            streamed = await client.post("/v1/embeddings", content=chunks())
            return announced, streamed

    for response in asyncio.run(run()):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert response.headers["connection"] == "close"


def test_too_many_bodies_at_a_time(encoder):
    """Of bodies that together are too much the last is refused with 429, and the others go on."""

    async def run():
        async with asked_of(encoder, max_total_body_bytes=100) as client:
            goes_on = asyncio.Event()

            async def slowly():
                yield b" " * 80
                await goes_on.wait()
                yield b'{"model": "tiny", "input": "a"}'[:20]

            slow = asyncio.ensure_future(client.post("/v1/embeddings", content=slowly()))
            await asyncio.sleep(0)
            refused = None
            while refused is None or refused.status_code == 200:  # until the first has begun
                refused = await post(client)
            goes_on.set()
            return refused, (await slow).status_code, (await post(client)).status_code

    refused, slow, afterwards = asyncio.run(run())
    assert refused.status_code == 429
    assert slow == 400  # not JSON, and read to its end
    assert afterwards == 200


def test_tokens_beyond_the_limit(encoder):
    async def run():
        async with asked_of(encoder, max_request_tokens=8) as client:
            return await post(client, json={**BODY, "input": ["a b", "c d e"]})

    response = asyncio.run(run())
    assert response.status_code == 413
    assert "9 tokens" in response.json()["error"]["message"]


def test_texts_that_may_not_be_cut(encoder):
    """Without truncation a text beyond the model's limit is refused by name."""

    async def run():
        async with asked_of(encoder, truncate=False) as client:
            return await post(client, json={**BODY, "input": ["a", "b " * 15]})

    response = asyncio.run(run())
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input[1]"
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_call_that_fails(encoder, caplog):
    """An error of the model is a 500 that tells nobody how, and the next request is answered."""

    async def run():
        async with asked_of(encoder) as client:
            encoder.before_call = fail
            failed = await post(client)
            encoder.before_call = lambda: None
            return failed, await post(client)

    def fail():
        raise ValueError("a secret")

    with caplog.at_level(logging.INFO, logger="cudagraph_jax.access"):
        failed, after = asyncio.run(run())
    assert failed.status_code == 500
    request_id = failed.headers["x-request-id"]
    assert f"request {request_id} failed" in caplog.text
    assert f'"request_id":"{request_id}"' in caplog.text
    assert '"status":500' in caplog.text
    assert "secret" not in failed.text
    assert failed.json()["error"]["type"] == "server_error"
    assert after.status_code == 200


@pytest.mark.parametrize(
    ("vector", "says"),
    [
        (np.full(SIZE, np.nan, np.float32), "holds NaN or an infinity"),
        (np.zeros(SIZE + 1, np.float32), r"vectors of \(1, 9\), expected \(1, 8\)"),
    ],
)
def test_vectors_that_cannot_be(encoder, monkeypatch, caplog, vector, says):
    """They are the server's fault, and nobody gets them: the log says what is wrong."""
    monkeypatch.setattr(encoder, "vector", lambda answer: vector)

    async def run():
        async with asked_of(encoder) as client:
            return await post(client)

    assert asyncio.run(run()).status_code == 500
    assert re.search(says, caplog.text)
