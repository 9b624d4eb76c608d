"""Batchers in event loops."""

import asyncio
import threading

import pytest

from cudagraph_jax import Batcher, DeadlineError, InputShapeError
from tests.helpers.batched import Doubling, row


@pytest.fixture
def doubling():
    return Doubling()


def test_await(doubling):
    """Awaited, a batcher gives one row's answer; many at once share calls."""

    async def ask():
        async with Batcher(doubling.function) as batcher:
            answers = await asyncio.gather(
                *(batcher(row(value), deadline=60) for value in range(9))
            )
            return [answer[0] for answer in answers]

    assert asyncio.run(ask()) == [2 * value for value in range(9)]
    assert len(doubling.calls) < 9


def test_cancelled_before_it_runs(doubling):
    """A task that is cancelled while its item waits drops it: it is not run."""

    async def ask():
        async with Batcher(doubling.function) as batcher:
            doubling.hold()
            first = asyncio.create_task(batcher(row(1)))
            await asyncio.to_thread(doubling.entered.wait, 60)
            others = [asyncio.create_task(batcher(row(value))) for value in (2, 3)]
            await asyncio.sleep(0)
            assert batcher.stats()["waiting"] == 2
            others[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await others[0]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(batcher(row(4)), timeout=0)
            doubling.go.set()
            assert [(await task)[0] for task in (first, others[1])] == [2, 6]

    asyncio.run(ask())
    assert doubling.calls == [[1], [3]]


def test_errors(doubling):
    """What is refused or late is raised where it is awaited."""

    async def ask():
        async with Batcher(doubling.function) as batcher:
            with pytest.raises(InputShapeError):
                await batcher(row(1)[None])
            with pytest.raises(DeadlineError):
                await batcher(row(1), deadline=0)
            assert (await batcher(row(1)))[0] == 2

    asyncio.run(ask())


def test_a_loop_that_closes(doubling, caplog):
    """A loop that ends while its item runs takes nothing with it."""
    batcher = Batcher(doubling.function)
    doubling.hold()

    async def leave():
        task = asyncio.create_task(batcher(row(1)))
        await asyncio.to_thread(doubling.entered.wait, 60)
        return task

    asyncio.run(leave())  # which cancels what goes on
    doubling.go.set()
    assert batcher.submit(row(2)).result()[0] == 4
    batcher.close()
    assert batcher.stats()["items"]["answered"] == 2


def test_several_loops(doubling):
    """Event loops of several threads share a batcher."""
    found = {}

    def ask(number):
        async def ask_all():
            return await asyncio.gather(*(batcher(row(10 * number + n)) for n in range(10)))

        found[number] = [answer[0] for answer in asyncio.run(ask_all())]

    with Batcher(doubling.function) as batcher:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == {n: [2 * (10 * n + m) for m in range(10)] for n in range(4)}
