"""What a server tells of itself."""

import base64
import hashlib
import re

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from cudagraph_jax.server import embeddings_app
from tests.helpers.tiny_encoder import warm_encoder


def samples(client):
    text = client.get("/metrics").text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(client, embed):
    """Requests, texts and tokens are counted, beside the manager's and the batcher's counts."""
    before = samples(client)
    embed(input=["a b", "c " * 40])
    embed(input=[])
    client.get("/not/there")
    after = samples(client)

    def grown(name, **labels):
        key = (f"cudagraph_jax_{name}", *sorted(labels.items()))
        return after[key] - before.get(key, 0)

    path = "/v1/embeddings"
    assert grown("server_requests_total", path=path, status="200") == 1
    assert grown("server_requests_total", path=path, status="400") == 1
    assert grown("server_requests_total", path="other", status="404") == 1
    assert grown("server_request_seconds_count", path=path) == 2
    assert grown("server_texts_total") == 2
    assert grown("server_tokens_total") == 4 + 16
    assert grown("server_truncated_texts_total") == 1
    assert grown("batcher_items_total", batcher="tiny", outcome="answered") == 2
    assert ("cudagraph_jax_graphs", ("manager", "tiny")) in after
    assert after["cudagraph_jax_server_open_requests",] == 1  # the one that asks


def test_stats(client, embed):
    """`/stats` has the figures of the batcher and of the function."""
    embed()
    stats = client.get("/stats").json()
    assert stats["batcher"]["items"]["answered"] > 0
    assert stats["function"]["mode"] == "replay"
    assert stats["obstacle"] is None


def test_the_page(client, embed):
    """It shows hits, waste and the queue, loads nothing from elsewhere, and runs its own script."""
    embed()
    response = client.get("/")
    text = response.text
    assert response.headers["content-type"].startswith("text/html")
    for label in ("hit rate", "waste", "waiting", "queue p99", "Buckets"):
        assert label in text
    assert not re.findall(r"""(?:src|href)=|url\(|@import|https?://""", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in response.headers["content-security-policy"]


def test_a_name_is_text():
    """A model's name is shown as it is, whatever it looks like."""
    encoder = warm_encoder()
    client = TestClient(embeddings_app(encoder, model="<b>&'name"))
    assert "<b>&" not in client.get("/").text
    assert client.get("/v1/models").json()["data"][0]["id"] == "<b>&'name"
    encoder.batcher.close()


def test_open_paths(encoder):
    """With a key only paths below /v1 ask for it."""
    client = TestClient(embeddings_app(encoder, model="tiny", api_key="a key"))
    assert client.get("/v1/models").status_code == 401
    for headers in ({"authorization": "a key"}, {"authorization": "Bearer other"}):
        assert client.get("/v1/models", headers=headers).status_code == 401
    assert client.get("/v1/models", headers={"authorization": "Bearer a key"}).status_code == 200
    for path in ("/health", "/ready", "/metrics", "/stats", "/"):
        assert client.get(path).status_code == 200


def test_a_request_id_comes_back(client):
    assert client.get("/health", headers={"x-request-id": "abc"}).headers["x-request-id"] == "abc"
    assert len(client.get("/health").headers["x-request-id"]) == 32
