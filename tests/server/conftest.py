"""A warm application, asked in this process."""

import pytest
from starlette.testclient import TestClient

from cudagraph_jax.server import embeddings_app
from tests.helpers.tiny_encoder import warm_encoder


@pytest.fixture(scope="session")
def encoder():
    return warm_encoder()


@pytest.fixture(scope="session")
def client(encoder):
    """Without the application's start and end, so that all tests share the encoder."""
    return TestClient(embeddings_app(encoder, model="tiny"))


@pytest.fixture
def embed(client):
    """Posts a request for embeddings with some fields in the place of good ones."""

    def post(*, headers=None, **fields):
        given = {"model": "tiny", "input": "a text", **fields}
        body = {name: value for name, value in given.items() if value is not ...}
        return client.post("/v1/embeddings", json=body, headers=headers)

    return post
