"""The container file and the Kubernetes manifest of `examples/` fit the server, and each other.

Linters read them, too: `make lint`. No engine runs them here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from starlette.routing import Route
from starlette.testclient import TestClient

from cudagraph_jax import cli
from cudagraph_jax.server import embeddings_app
from tests.helpers.tiny_encoder import TinyEncoder

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "examples/container/Dockerfile").read_text("utf-8").replace("\\\n", "")
MANIFEST = (ROOT / "examples/kubernetes/embeddings.yaml").read_text("utf-8")
OBJECTS = {each["kind"]: each["spec"] for each in yaml.safe_load_all(MANIFEST)}
POD = OBJECTS["Deployment"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
SPARE_S = 5
"""In which the server ends, beside --drain-delay and --timeout: docs/serving.md."""


def instruction(name: str) -> str:
    """The arguments of the last instruction of this name."""
    return re.findall(rf"^{name} (.*)", DOCKERFILE, re.MULTILINE)[-1]


def options():
    """What the container runs, as the command line understands it."""
    command = json.loads(instruction("ENTRYPOINT"))
    assert command[0] == "cudagraph-jax"
    return cli._parser().parse_args([*command[1:], *CONTAINER["args"]])


def test_a_pod_has_the_time_to_end():
    """Kubernetes kills it later than the server would end of itself."""
    ends_after_s = options().drain_delay + options().timeout + SPARE_S
    assert POD["terminationGracePeriodSeconds"] > ends_after_s


def test_it_listens_where_it_is_asked():
    """One port, on all interfaces of the container, and paths that the server has."""
    assert options().host == "0.0.0.0"
    ports = [port["containerPort"] for port in CONTAINER["ports"]]
    assert ports == [options().port] == [int(instruction("EXPOSE"))]
    app = embeddings_app(TinyEncoder(), model="tiny")
    paths = {route.path for route in app.routes if isinstance(route, Route)}
    probes = [CONTAINER[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness")]
    assert probes == ["/ready"] * 2
    assert CONTAINER["livenessProbe"]["httpGet"]["path"] == "/health"
    assert {*probes, "/health"} <= paths
    assert f"http://127.0.0.1:{options().port}/ready" in instruction("HEALTHCHECK")


def test_it_serves_the_store_that_was_baked():
    """The command names the folder that the build fills, as the user who owns it."""
    store = str(options().store)
    assert f"Encoder(store='{store}').warmup(" in DOCKERFILE
    assert f"install --directory --owner serve --mode 700 {store}\n" in DOCKERFILE
    assert DOCKERFILE.index("\nUSER ") < DOCKERFILE.index("Encoder(store=")
    assert POD["securityContext"]["runAsUser"] == int(instruction("USER"))


def test_it_is_scaled_by_what_it_tells():
    """The metric of the autoscaler is one of the server's."""
    (metric,) = OBJECTS["HorizontalPodAutoscaler"]["metrics"]
    text = TestClient(embeddings_app(TinyEncoder(), model="tiny")).get("/metrics").text
    assert f"\n{metric['pods']['metric']['name']}{{" in text


@pytest.mark.parametrize("kind", ["Deployment", "Service", "PodDisruptionBudget"])
def test_everything_selects_the_pods(kind):
    """Service, budget and deployment mean the same pods."""
    selector = OBJECTS[kind]["selector"]
    labels = OBJECTS["Deployment"]["template"]["metadata"]["labels"]
    assert selector.get("matchLabels", selector) == labels
