"""What becomes of a led process's turns when links, threads or other processes fail."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from cudagraph_jax import DistributedError
from cudagraph_jax.distributed.link import Door, Link, encoded, knock
from cudagraph_jax.distributed.turns import Turns
from tests.helpers.processes import run_script


@pytest.fixture
def ends():
    """Both ends of two links: of process 0, and of the processes 1 and 2."""
    with closing(Door()) as door, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(door.let_in, 2, timeout_s=5)
        others = [knock(door.address, index, timeout_s=5) for index in (1, 2)]
        own = waiting.result()
    yield own, others
    for link in (*own, *others):
        link.close()


@pytest.fixture
def led(ends):
    """Makes the turns of process 0, which end with the test."""
    made = []

    def make(timeout_s=5.0, received=lambda link, message: None):
        made.append(Turns(ends[0], timeout_s=timeout_s, received=received))
        made[-1].start()
        return made[-1]

    yield make
    for turns in made:
        turns.close()


def failed(turns):
    """What it fails with."""
    with pytest.raises(DistributedError) as caught:
        turns.wait()
    return str(caught.value)


def heard(link):
    """What is heard next, but for the pulse."""
    while not (message := link.receive()).head:
        pass
    return message


def test_a_message_that_is_none(ends, led):
    """It fails, and so it does where what gets a message does: no thread just ends."""
    turns = led()
    ends[1][0].send(b"\0\0\0\1" + bytes(8) + b"?")
    assert "its thread from-1 has failed: JSONDecodeError" in failed(turns)


def test_a_receiver_that_fails(ends, led):
    """What is raised there is told to all, whatever it is."""

    def received(link, message):
        raise SystemExit("no more")

    turns = led(received=received)
    ends[1][1].send(encoded({"done": 1}))
    assert "its thread from-2 has failed: SystemExit: no more" in failed(turns)
    assert heard(ends[1][0]).head == {"failed": "its thread from-2 has failed: SystemExit: no more"}


def test_one_of_them_cannot_be_told(ends, led):
    """The others are told all the same, and then that it has failed."""
    turns = led()
    ends[0][0].end()  # as if the connection to the first one had gone
    with pytest.raises(DistributedError, match="process 1 cannot be told"):
        turns.tell({"n": 1}, [np.arange(3)], limit_s=5)
    message = heard(ends[1][1])
    assert message.head == {"n": 1}
    np.testing.assert_array_equal(message.arrays[0], np.arange(3))
    assert "process 1 cannot be told" in heard(ends[1][1]).head["failed"]


def test_one_of_them_is_far_behind(ends, led):
    """It is told so much and no more; as soon as it has done something, it is told the next."""
    turns: Turns = led(received=lambda link, message: turns.has_done(link))
    for number in range(16):
        turns.tell({"n": number}, [], limit_s=5)
    for other in ends[1]:
        other.send(encoded({"done": 0}))
    turns.tell({"n": 16}, [], limit_s=5)
    with pytest.raises(DistributedError, match="process 1 cannot be told: it is far behind"):
        turns.tell({"n": 17}, [], limit_s=0.05)


def test_the_end(ends, led):
    """It is there when all have said so, after which their connections may go."""
    turns = led()
    for other in ends[1]:
        other.send(encoded({"ended": True}))
        other.close()
    turns.wait_for_ends()
    assert turns.failure is None


def test_an_end_that_does_not_come(ends, led):
    """All of them have one time together, and who is late is named."""
    turns = led(timeout_s=0.3)
    others = [Turns([link], timeout_s=0.3, received=lambda *_: None) for link in ends[1]]
    for other in others:
        other.start()
    start = time.monotonic()
    with pytest.raises(DistributedError, match="process 1, 2 has not said in time"):
        turns.wait_for_ends()
    assert time.monotonic() - start < 0.6
    for other in others:
        assert "process 0 says: process 1, 2 has not said" in failed(other)
        other.close()


def test_a_failure_at_the_end(ends, led):
    """What the last call fails with elsewhere is raised by whoever waits for the end."""
    turns = led()
    ends[1][0].send(encoded({"ended": True}))
    ends[1][1].send(encoded({"failed": "the last call"}))
    with pytest.raises(DistributedError, match="process 2 says: the last call"):
        turns.wait_for_ends()


class Recorded(Link):
    """A link that keeps what is said, until it is ended; at the first word something happens."""

    def __init__(self, peer):
        self.peer, self.first, self._is_ended, self.said = peer, [], False, []

    def send(self, data):
        if self._is_ended:
            raise BrokenPipeError
        self.said.append(data)
        while self.first:
            self.first.pop()()

    def end(self):
        self._is_ended = True

    close = end


def test_a_failure_is_told_before_the_links_are_closed():
    """Who is woken by it may leave the block before all are told: the others learn the reason."""
    links = [Recorded(1), Recorded(2)]
    turns = Turns(links, timeout_s=5, received=lambda *_: None)
    turns._threads.clear()  # nothing is read
    links[0].first.append(turns.close)
    turns.fail("process 3 is gone")
    for link in links:
        assert link.said[0] == encoded({"failed": "process 3 is gone"})


class Refusing(threading.Thread):
    """A thread that cannot be started, once two others were."""

    def start(self):
        if "from" in self.name:
            raise RuntimeError("can't start new thread")
        super().start()


def test_threads_that_cannot_be_started(ends):
    """Nothing goes on without them, and the others are told."""
    turns = Turns(ends[0], timeout_s=5, received=lambda *_: None, thread=Refusing)
    with pytest.raises(RuntimeError, match="can't start"):
        turns.start()
    assert "can't start new thread" in heard(ends[1][0]).head["failed"]
    with pytest.raises(ConnectionError):
        heard(ends[1][0])
    with pytest.raises(DistributedError, match="it cannot begin"):
        turns.do(list)


def test_an_end_that_is_interrupted(ends, led):
    """All of it has failed, here and there: nobody knows who has come to the end."""
    turns = led()
    with pytest.raises(KeyboardInterrupt), turns.ending():
        raise KeyboardInterrupt
    assert "it was interrupted" in str(turns.failure)
    for other in ends[1]:
        assert heard(other).head == {"failed": "it was interrupted"}


def test_a_forked_child():
    """It has no part in the links, and ends nothing of its parent's, whatever it closes."""
    done = run_script(
        """
        import os
        from contextlib import closing
        from concurrent.futures import ThreadPoolExecutor
        from cudagraph_jax import DistributedError
        from cudagraph_jax.distributed.link import Door, encoded, knock
        from cudagraph_jax.distributed.turns import Turns

        with closing(Door()) as door, ThreadPoolExecutor(1) as pool:
            other = pool.submit(knock, door.address, 1, timeout_s=5)
            own, = door.let_in(1, timeout_s=5)
        turns = Turns([own], timeout_s=5, received=lambda *_: None)
        turns.start()
        if not os.fork():
            try:
                turns.do(list)
            except DistributedError as error:
                print(error, own._connection.fileno(), flush=True)
            turns.close()
            os._exit(0)
        os.wait()
        turns.do(lambda: turns.tell({"n": 1}, [], limit_s=5))
        while not (head := other.result().receive().head):
            pass
        print(head, turns.failure)
        """
    )
    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.splitlines()
    assert child == "this process was forked from one of a led job: call there -1"
    assert parent == "{'n': 1} None"
