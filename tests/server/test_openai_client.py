"""The client that OpenAI publishes, as it is."""

import threading

import numpy as np
import openai
import pytest

from tests.helpers.served import served
from tests.helpers.tiny_encoder import TinyTokenize, expected

KEY = "a key"
tokenize = TinyTokenize()


@pytest.fixture(scope="module")
def server():
    with served("--api-key", KEY, "--max-waiting", "4", "--delay", "0.02") as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"dimensions": 3}])
@pytest.mark.parametrize("asked", ["one text", ["one", "and another"], [5, 6], [[5, 6], [7]]])
def test_vectors(asked, options, client):
    """Texts and token ids, one or many, as base64 (its default) and as floats."""
    answer = client.embeddings.create(model="tiny", input=asked, **options)
    if isinstance(asked, str):
        rows = tokenize([asked])
    elif isinstance(asked[0], str):
        rows = tokenize(asked)
    else:
        rows = [asked] if isinstance(asked[0], int) else asked
    found = np.array([one.embedding for one in answer.data])
    want = [expected(row, options.get("dimensions", 8)) for row in rows]
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert answer.usage.total_tokens == sum(map(len, rows))
    assert answer.model == "tiny"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "cudagraph-jax"


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"input": []}, openai.BadRequestError, "input"),
        ({"dimensions": 100}, openai.UnprocessableEntityError, "dimensions"),
        ({"model": "other"}, openai.NotFoundError, "model"),
    ],
)
def test_errors_are_its_own(fields, error, param, client):
    """What is refused raises the client's class for it, with our message and field."""
    with pytest.raises(error) as raised:
        client.embeddings.create(**{"model": "tiny", "input": "a", **fields})
    assert raised.value.param == param
    assert raised.value.code
    assert raised.value.request_id


def test_a_wrong_key(server):
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as raised,
    ):
        client.embeddings.create(model="tiny", input="a")
    assert raised.value.code == "invalid_api_key"


def test_it_retries_when_the_queue_is_full(server, client):
    """Of many at a time some are refused with 429; with retries all are answered."""
    statuses, lock = [], threading.Lock()

    def ask(client):
        try:
            client.embeddings.create(model="tiny", input=["a"] * 4)
            found = 200
        except openai.RateLimitError as error:
            found = error.status_code
        with lock:
            statuses.append(found)

    def at_once(client):
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    at_once(client)
    assert set(statuses) == {200, 429}
    statuses.clear()
    at_once(client.with_options(max_retries=20))
    assert statuses == [200] * 8
