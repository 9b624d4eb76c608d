"""`examples/ray_serve.py` on a real Ray: replicas that share a store, and what ends some of them.

The encoder is tiny; all between it and the clients is what the example serves with.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import ray
from ray import serve

from examples.ray_serve import Options, scaled
from tests.helpers.tiny_encoder import TinyTokenize, expected
from tests.ray.noted_encoder import ILL, NotedEncoder, warm_ups

TEXTS = [" ".join("abcdefgh"[:count]) for count in range(1, 9)]
BEFORE = 200
"""Requests that are answered before something happens."""

# Ray forks, to run other programs at once; JAX has threads by then.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")

Ask = Callable[[str], Awaitable[Sequence[float] | None]]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where a local Ray answers requests."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # Ray's sockets have paths of at most 107 characters, so that none of pytest's folders will do.
    with tempfile.TemporaryDirectory(prefix="ray-") as scratch:
        ray.init(
            num_cpus=2,
            object_store_memory=80 << 20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=scratch,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


class Replicas:
    """Those that run.

    Attributes:
        handle: What other deployments would call.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def scale(self, count: int) -> None:
        """Returns when there are so many."""
        deployment = scaled(Options(replicas=count))
        self.handle = serve.run(deployment.bind(partial(NotedEncoder, self._folder), "tiny"))

    def warm_ups(self) -> dict[int, tuple[int, int]]:
        """How many buckets each process compiled and loaded, by its id, the first one first."""
        return warm_ups(self._folder)

    def wait_for(self, count: int) -> None:
        """Until so many have been warm, those that ended among them, and two run."""
        until = time.monotonic() + 60
        while len(self.warm_ups()) < count or running() != 2:
            assert time.monotonic() < until
            self.handle.embed.remote("a").result()  # keeps time, too


def running() -> int:
    """How many replicas Ray counts."""
    states = serve.status().applications["default"].deployments["Embeddings"].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


@pytest.fixture(scope="module")
def replicas(url: str, tmp_path_factory: pytest.TempPathFactory) -> Replicas:
    """One replica, and then a second one beside it."""
    replicas = Replicas(tmp_path_factory.mktemp("replicas"))
    for count in (1, 2):
        replicas.scale(count)
    return replicas


@dataclass
class Load:
    """Requests of many clients, again and again, while something happens to the replicas.

    Attributes:
        wrong: Texts that were answered with another vector than theirs.
        answered: How many were answered.
        failed: When each request that was not answered began and ended.
    """

    wrong: list[str] = field(default_factory=list)
    answered: int = 0
    failed: list[tuple[float, float]] = field(default_factory=list)

    async def client(self, ask: Ask, is_over: Callable[[], bool]) -> None:
        """One client's requests."""
        while not is_over():
            for text in TEXTS:
                began = time.monotonic()
                vector = await ask(text)
                if vector is None:
                    self.failed.append((began, time.monotonic()))
                    continue
                self.answered += 1
                (row,) = TinyTokenize()([text])
                if not np.allclose(vector, expected(row), atol=1e-5):
                    self.wrong.append(text)


async def ask_once(client: httpx.AsyncClient, text: str) -> Sequence[float] | None:
    """A text's vector; None if the server failed."""
    response = await client.post("/v1/embeddings", json={"model": "tiny", "input": text})
    if response.status_code == 500:
        return None
    assert response.status_code == 200
    vector: Sequence[float] = response.json()["data"][0]["embedding"]
    return vector


async def ask_again(client: openai.AsyncOpenAI, text: str) -> Sequence[float]:
    """The same by OpenAI's client, which tries three times."""
    return (await client.embeddings.create(model="tiny", input=text)).data[0].embedding


async def under_load(
    url: str, happen: Callable[[], object], is_over: Callable[[], bool]
) -> tuple[Load, Load]:
    """What became of requests that were sent once, and of those that were sent again."""
    once, again = Load(), Load()
    async with (
        httpx.AsyncClient(base_url=url, timeout=60) as plain,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        clients = [once.client(partial(ask_once, plain), is_over) for _ in range(8)]
        clients += [again.client(partial(ask_again, client), is_over) for _ in range(8)]
        tasks = [asyncio.create_task(each) for each in clients]
        while once.answered < BEFORE:
            await asyncio.wait(tasks, timeout=0.01)
        await asyncio.to_thread(happen)
        await asyncio.gather(*tasks)
    return once, again


@dataclass
class Killing:
    """One replica killed under load.

    Attributes:
        once: What became of requests that were sent once.
        again: Of those that were sent again where they failed.
        at: When it was.
        replacement: The id of the process that took the place.
    """

    once: Load
    again: Load
    at: float
    replacement: int


@pytest.fixture(scope="module")
def killing(url: str, replicas: Replicas) -> Killing:
    before = replicas.warm_ups()
    victim = list(before)[-1]
    killed: list[float] = []

    def kill() -> None:
        os.kill(victim, signal.SIGKILL)
        killed.append(time.monotonic())

    def is_over() -> bool:
        return len(replicas.warm_ups()) > len(before)

    once, again = asyncio.run(under_load(url, kill, is_over))
    return Killing(once, again, killed[0], list(replicas.warm_ups())[-1])


def test_the_second_replica_compiles_nothing(replicas):
    """The first fills the store with both buckets, and the second loads them."""
    first, second = list(replicas.warm_ups().values())[:2]
    assert (first, second) == ((2, 0), (0, 2))


def test_openai_client(url, replicas):
    """OpenAI's client gets the vectors of its texts, in their order."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.embeddings.create(model="tiny", input=TEXTS)
    vectors = [data.embedding for data in answer.data]
    np.testing.assert_allclose(vectors, list(map(expected, TinyTokenize()(TEXTS))), atol=1e-5)
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.embeddings.create(model="other", input="a")


def test_handle(replicas):
    """Other deployments get a text's vector without HTTP."""
    answers = [replicas.handle.embed.remote(text) for text in TEXTS]
    vectors = [answer.result() for answer in answers]
    np.testing.assert_allclose(vectors, list(map(expected, TinyTokenize()(TEXTS))), atol=1e-5)


def test_a_killed_replica_loses_only_what_it_had(killing):
    """Requests of before the kill fail, and none that began after it; each answer is right."""
    assert all(began < killing.at < ended for began, ended in killing.once.failed)
    assert len(killing.once.failed) <= 8  # one of each client
    assert killing.once.answered > BEFORE
    assert killing.once.wrong == []


def test_clients_that_try_again_lose_nothing(killing):
    """OpenAI's client, as it comes, has an answer to each request."""
    assert killing.again.answered > 0
    assert killing.again.wrong == []


def test_a_killed_replica_is_replaced_by_one_that_compiles_nothing(replicas, killing):
    """Ray starts another one, which loads what the first one compiled."""
    assert replicas.warm_ups()[killing.replacement] == (0, 2)


def test_a_replica_that_is_not_ready_is_replaced(replicas, killing):
    """Where `/ready` would say 503, Ray starts another replica, which loads all buckets."""
    before = replicas.warm_ups()
    replicas.handle.embed.remote(ILL).result()
    replicas.wait_for(len(before) + 1)
    assert list(replicas.warm_ups().values())[-1] == (0, 2)


def test_a_replica_that_is_not_needed_answers_what_it_has(url, replicas, killing):
    """To scale down under load fails no request."""
    over: list[bool] = []

    def scale_down() -> None:
        replicas.scale(1)
        over.append(True)

    once, again = asyncio.run(under_load(url, scale_down, lambda: bool(over)))
    assert running() == 1
    assert once.failed == []
    assert once.wrong == again.wrong == []
