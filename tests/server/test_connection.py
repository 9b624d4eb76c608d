"""Connections that ask for nothing, or for too much, end; those that ask are answered."""

import asyncio
import logging

import pytest
import uvicorn

from cudagraph_jax.server import embeddings_app
from cudagraph_jax.server.connection import Connection
from cudagraph_jax.server.process import listen
from tests.helpers.served import post


class Hasty(Connection):
    """One that waits for a fraction of the usual time."""

    head_s = 0.05
    read_s = 0.05


def exchanged(app, *talks):
    """What came of some talks with a server in this process, each with a connection of its own."""

    async def run():
        listener = listen("127.0.0.1", 0)
        config = uvicorn.Config(app, http=Hasty, ws="none", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        results = []
        for talk in talks:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            results.append(await talk(reader, writer))
            writer.close()
        server.should_exit = True
        await serving
        return results

    return asyncio.run(run())


@pytest.fixture
def app(encoder):
    return embeddings_app(encoder, model="tiny")


def sending(*chunks):
    """Sends something and reads to the end, which the server makes."""

    async def talk(reader, writer):
        try:
            for chunk in chunks:
                writer.write(chunk)
                await writer.drain()
            return await reader.read()
        except ConnectionError:
            return b"reset"

    return talk


def test_no_request(app):
    """A connection on which nothing, or half a head, or half of a second one comes is ended."""
    whole = post(b'{"model":"tiny","input":"a"}')

    async def one_and_a_half(reader, writer):
        writer.write(whole)
        first = await reader.readuntil(b"}}")
        writer.write(whole[:30])
        return first, await sending()(reader, writer)

    nothing, half, (first, rest) = exchanged(app, sending(), sending(whole[:30]), one_and_a_half)
    assert {nothing, half, rest} <= {b"", b"reset"}
    assert first.startswith(b"HTTP/1.1 200 OK")


def test_headers_without_end(app):
    """Headers beyond the limit are refused, or the connection is ended."""
    head = b"GET /health HTTP/1.1\r\nhost: x\r\n"
    lines = [b"x-%d: %s\r\n" % (i, b"a" * 10_000) for i in range(200)]
    (answer,) = exchanged(app, sending(head, *lines))
    assert answer == b"reset" or answer.startswith(b"HTTP/1.1 431 ")
    assert answer == b"reset" or b"headers_too_large" in answer


def test_what_is_no_http(app):
    """It is refused in the form of all errors."""
    (answer,) = exchanged(app, sending(b"\x16\x03\x01\x02\x00 hello\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"invalid_http"' in answer


def test_pipelined_requests(app):
    """Requests that come together are answered one after the other."""
    whole = post(b'{"model":"tiny","input":"a"}')
    last = whole.replace(b"host: x", b"host: x\r\nconnection: close")
    (answer,) = exchanged(app, sending(whole * 3 + last))
    assert answer.count(b"HTTP/1.1 200 OK") == 4


def test_a_client_that_reads_nothing(caplog):
    """It is cut off when it has not read for a while, and its answer is let go."""
    large = b"x" * (64 << 20)
    ended = asyncio.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": large, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.set()

    async def talk(reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        writer.transport.pause_reading()
        await ended.wait()
        return "cut off"

    with caplog.at_level(logging.CRITICAL):
        assert exchanged(app, talk) == ["cut off"]


def test_too_many_requests_at_a_time(app):
    """Of requests that come together only so many are taken; the connection ends."""
    (answer,) = exchanged(app, sending(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 500))
    assert answer == b"reset" or answer.count(b"HTTP/1.1") < 50


def test_what_follows_a_body(app):
    """Trailers are let go, and with more of them than of the body the connection ends."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
    body = b'{"model":"tiny","input":"a"}'
    chunk = b"%x\r\n%s\r\n0\r\n" % (len(body), body)
    end = b"connection: close\r\n\r\n"
    good, bad = exchanged(
        app,
        sending(head + end + chunk + b"x-a: b\r\n\r\n"),
        sending(head + b"\r\n" + chunk, *[b"x-a: " + b"b" * 10_000 + b"\r\n"] * 50),
    )
    assert good.startswith(b"HTTP/1.1 200 OK")
    assert bad == b"reset" or b"headers_too_large" in bad


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_of_another_protocol(app, chunked, in_pieces):
    """It is answered in HTTP/1.1, body and all, and so are the requests behind it."""
    body = b'{"model":"tiny","input":"a b c"}'
    framing, framed = b"content-length: %d" % len(body), body
    if chunked:
        framing, framed = (
            b"transfer-encoding: chunked",
            b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body),
        )
    offer = (
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\n"
        b"upgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n%s\r\n\r\n%s" % (framing, framed)
    )
    bare = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    last = b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    sent = offer + bare + offer + last
    pieces = [sent[i : i + 7] for i in range(0, len(sent), 7)] if in_pieces else [sent]
    (answer,) = exchanged(app, sending(*pieces))
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    assert answer.count(b'"total_tokens":5') == 2
    assert b'{"status":"alive"}' in answer
    assert b'{"status":"ready"}' in answer
