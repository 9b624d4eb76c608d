"""What `POST /v1/embeddings` answers, beside NumPy."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.examples import examples
from tests.helpers.tiny_encoder import MAX_TOKENS, SIZE, VOCAB, TinyTokenize, expected

tokenize = TinyTokenize()


def vectors(response):
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    assert all(one["object"] == "embedding" for one in data)
    return np.array([one["embedding"] for one in data], np.float32)


def decoded(response):
    data = response.json()["data"]
    return np.array([np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in data])


def test_one_text(embed):
    """A text gives its unit vector, the model's name and its tokens."""
    response = embed(input="some words here")
    np.testing.assert_allclose(
        vectors(response), [expected(tokenize(["some words here"])[0])], atol=1e-6
    )
    answer = response.json()
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


@examples(40, thorough=100)
@given(
    texts=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=6),
    base64_=st.booleans(),
    dimensions=st.none() | st.integers(1, SIZE),
)
def test_many_texts(texts, base64_, dimensions, client):
    """Any texts have the vectors of their own tokens, in their order, in both encodings."""
    body = {"model": "tiny", "input": texts, "dimensions": dimensions}
    if base64_:
        body["encoding_format"] = "base64"
    response = client.post("/v1/embeddings", json=body)
    found = decoded(response) if base64_ else vectors(response)
    rows = tokenize(texts)
    want = [expected(row, dimensions or SIZE) for row in rows]
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert response.json()["usage"]["total_tokens"] == sum(map(len, rows))


def test_token_ids(embed):
    """Token ids are taken as they are, one list or several."""
    np.testing.assert_allclose(vectors(embed(input=[5, 6])), [expected([5, 6])], atol=1e-6)
    rows = [[1, 2], [VOCAB - 1], [0] * MAX_TOKENS]
    np.testing.assert_allclose(vectors(embed(input=rows)), [expected(r) for r in rows], atol=1e-6)


def test_floats_are_exact(embed):
    """Both encodings carry the same float32 numbers."""
    floats = vectors(embed(input=["x y z"]))
    np.testing.assert_array_equal(floats, decoded(embed(input=["x y z"], encoding_format="base64")))


def test_texts_beyond_the_limit(embed):
    """They lose their end, and the answer says how many did."""
    long = "word " * 40
    response = embed(input=["short", long, long])
    assert response.headers["x-truncated-texts"] == "2"
    np.testing.assert_allclose(
        vectors(response)[1], expected(tokenize(["word " * (MAX_TOKENS - 2)])[0]), atol=1e-6
    )
    assert "x-truncated-texts" not in embed(input="short").headers


def test_user_is_taken(embed):
    assert embed(user="somebody").status_code == 200


def test_models(client):
    """The one model is listed and found."""
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json() == model


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"model": ...}, 400, "model", "missing"),
        ({"model": 3}, 400, "model", "not 3"),
        ({"model": "other"}, 404, "model", "ask for 'tiny'"),
        ({"input": ...}, 400, "input", "missing"),
        ({"input": None}, 400, "input", "expected a text"),
        ({"input": []}, 400, "input", "none empty"),
        ({"input": ""}, 400, "input", "at least 1 character"),
        ({"input": {"a": 1}}, 400, "input", "expected a text"),
        ({"input": 1.5}, 400, "input", "expected a text"),
        ({"input": ["a", ""]}, 400, "input[1]", "at least 1 character"),
        ({"input": ["a", 3]}, 400, "input[1]", "not 3"),
        ({"input": ["a", None]}, 400, "input[1]", "string"),
        ({"input": [1, "a"]}, 400, "input[1]", "'a'"),
        ({"input": [1, 2.5]}, 400, "input[1]", "2.5"),
        ({"input": [True]}, 400, "input[0]", "integer"),
        ({"input": [[1], []]}, 400, "input[1]", "at least 1 item"),
        ({"input": [[1], [2, "a"]]}, 400, "input[1][1]", "'a'"),
        ({"input": [5, VOCAB]}, 422, "input[1]", f"vocabulary has {VOCAB}"),
        ({"input": [[5], [6, -1]]}, 422, "input[1][1]", "no token id"),
        ({"input": [2] * (MAX_TOKENS + 1)}, 400, "input", "the model's limit is 16"),
        ({"input": [[2], [2] * (MAX_TOKENS + 1)]}, 400, "input[1]", "shorten"),
        ({"encoding_format": "hex"}, 400, "encoding_format", "'float' or 'base64'"),
        ({"dimensions": 0}, 400, "dimensions", "greater than 0"),
        ({"dimensions": "8"}, 400, "dimensions", "integer"),
        ({"dimensions": SIZE + 1}, 422, "dimensions", "8: ask for fewer"),
        ({"user": 7}, 400, "user", "string"),
        ({"inputs": "a"}, 400, "inputs", "no argument"),
        ({"a text": "a"}, 400, "a text", "no argument"),
        ({"input": ["a"] * 2049}, 413, "input", "limit of a request is 2048"),
        ({"input": [10**30]}, 422, "input[0]", "no token id"),
    ],
)
def test_refusals(fields, status, param, says, embed):
    """What cannot be answered is refused in OpenAI's form, with the field named."""
    response = embed(**fields)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    assert error["type"] == kind


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "EOF"),
        (b"{", "EOF"),
        (b"[1]", "the body"),
        (b'"text"', "the body"),
        (b"null", "the body"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 10_000, "recursion"),
        (b'{"model": "tiny", "input": "\\ud800"}', "hex escape"),
    ],
)
def test_bodies_that_are_no_requests(body, says, client):
    response = client.post("/v1/embeddings", content=body)
    assert response.status_code == 400, response.text
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize("given", ["-1", "0", "soon", "nan", "inf", ""])
def test_a_timeout_that_is_none(given, embed):
    """A time that cannot be is refused, with the header named."""
    response = embed(headers={"x-request-timeout": given})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
_fields = st.dictionaries(
    st.sampled_from(["model", "input", "encoding_format", "dimensions", "user", "other"]), _json
)


@given(body=_json | _fields | _fields.map(lambda fields: {"model": "tiny", **fields}))
def test_any_json(body, client):
    """Whatever JSON comes, the answer is vectors or an error that says what is wrong."""
    response = client.post("/v1/embeddings", content=json.dumps(body))  # infinities, too
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, response.text
        assert response.json()["error"]["message"]


@given(body=st.binary(max_size=200))
def test_any_bytes(body, client):
    response = client.post("/v1/embeddings", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/embeddings", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/chat/completions", 404),
        ("GET", "/v1/embeddings/", 404),
        ("GET", "/v1/models/other", 404),
    ],
)
def test_unknown_paths(method, path, status, client):
    """Paths and methods that are not there are refused in the same form."""
    response = client.request(method, path)
    assert response.status_code == status
    message = response.json()["error"]["message"]
    assert status != 405 or message.endswith(f"it takes {response.headers['allow']}")


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        (b'["a"' + b",3" * 1_000_000 + b"]", 400, "input[1]"),
        (b"[[1]" + b",[1]" * 500_000 + b"]", 413, "input"),
        (b"[1" + b",1" * 500_000 + b"]", 413, "input"),
    ],
)
def test_long_lists(content, status, param, client):
    """The first fault of a long list is told, and none of the others is looked for."""
    response = client.post("/v1/embeddings", content=b'{"model":"tiny","input":' + content + b"}")
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
    assert len(response.content) < 1000
