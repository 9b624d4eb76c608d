"""A batcher and its process: its end, forks, Ctrl-C."""

import os

import pytest

from tests.helpers.processes import said_by

PREPARED = """
import os, signal, threading
import numpy as np
from cudagraph_jax import Batcher, CUDAGraphError
from tests.helpers.batched import Doubling, row

doubling = Doubling()
batcher = Batcher(doubling.function)
"""


def test_the_end_of_the_interpreter():
    """A process ends with a batcher that was never closed, and with items that wait."""
    said = said_by(
        PREPARED
        + """
print(batcher.submit(row(1)).result()[0])
doubling.hold()
first = batcher.submit(row(2))
assert doubling.entered.wait(60)
waiting = batcher.submit(row(3))
waiting.add_done_callback(lambda future: print("cancelled:", future.cancelled(), flush=True))
threading.Timer(0, doubling.go.set).start()
"""
    )
    assert said.splitlines() in (["2.0", "cancelled: True"], ["2.0", "cancelled: False"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks nothing here")
def test_a_fork():
    """A child hangs on nothing: what waited fails there, and is answered in the parent."""
    said = said_by(
        "import warnings; warnings.simplefilter('ignore')"
        + PREPARED
        + """
doubling.hold()
running = batcher.submit(row(1))
assert doubling.entered.wait(60)
waiting = batcher.submit(row(2))
child = os.fork()
if not child:
    signal.alarm(20)
    for future in (running, waiting):
        print(type(future.exception()).__name__)
    try:
        batcher.submit(row(3))
    except CUDAGraphError as error:
        print("forked" in str(error), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
doubling.go.set()
print(running.result()[0], waiting.result()[0])
batcher.close()
"""
    )
    assert said.split() == ["CUDAGraphError", "CUDAGraphError", "True", "2.0", "4.0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks nothing here")
def test_a_fork_within_a_callback():
    """An item that is answered when its process forks stays so in the child, which calls nobody."""
    said = said_by(
        "import warnings; warnings.simplefilter('ignore')"
        + PREPARED
        + """
def fork(future):
    child = os.fork()
    if not child:
        signal.alarm(20)
        print(future.result()[0], flush=True)
        print(type(other.exception()).__name__, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

doubling.hold()
answered, other = batcher.submit(row(1)), None
answered.add_done_callback(fork)
other = batcher.submit(row(2))
other.add_done_callback(lambda future: print("called", future.result()[0], flush=True))
doubling.go.set()
batcher.close()
"""
    )
    assert said.splitlines() == ["2.0", "CUDAGraphError", "called 4.0"]


def test_an_interrupt_in_map():
    """Ctrl-C in `map` reaches the caller; what waits is cancelled, and the batcher goes on."""
    said = said_by(
        PREPARED
        + """
doubling.hold()
def interrupt(x):
    doubling.when_called = lambda x: None
    os.kill(os.getpid(), signal.SIGINT)
doubling.when_called = interrupt
threading.Thread(target=lambda: (doubling.entered.wait(60), doubling.go.set())).start()
try:
    while True:
        batcher.map([row(value) for value in range(1000)])
except KeyboardInterrupt:
    print("interrupted")
print(batcher.submit(row(1)).result()[0])
batcher.close()
print(batcher.stats()["waiting"])
"""
    )
    assert said.splitlines() == ["interrupted", "2.0", "0"]
