"""A registration has a name of its own, ends with its manager, and checks what it is given."""

from __future__ import annotations

import gc
import math

import pytest

from cudagraph_jax import ConfigError, CUDAGraphManager
from cudagraph_jax.prometheus import register
from cudagraph_jax.prometheus.registration import Registration
from tests.helpers.functions import GRID, floats
from tests.helpers.scrapes import bucketed, samples_of


def test_a_name_is_taken_once(registry):
    """The same name twice is a ConfigError; after unregister it is free."""
    function = bucketed()
    registration = register(function.manager, name="a", registry=registry)
    assert repr(registration) == "Registration('a')"
    with pytest.raises(ConfigError, match="name='a' is registered already: give each manager"):
        register(CUDAGraphManager(GRID), name="a", registry=registry)
    registration.unregister()
    registration.unregister()
    registration.update()
    assert not registration.is_alive
    assert samples_of(registry, "a") == {}
    assert register(function.manager, name="a", registry=registry).is_alive


def test_unregister_stops_watching(registry):
    """After unregister the manager is watched no more."""
    function = bucketed()
    register(function.manager, registry=registry, replay_times=True).unregister()
    assert not function.registry.observers.watches_replays
    function(floats(0, 3, 5))
    assert samples_of(registry) == {}


def test_a_registration_keeps_no_manager_alive(registry):
    """The manager may go: its series go with the next scrape, and its name is free."""
    function = bucketed()
    function(floats(0, 3, 5))
    registration = register(function.manager, registry=registry, replay_times=True)
    assert samples_of(registry)["graphs"] == 1
    del function
    gc.collect()
    assert not registration.is_alive
    again = bucketed()
    register(again.manager, registry=registry)
    assert samples_of(registry)["graphs"] == 0
    del again
    gc.collect()
    assert samples_of(registry) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "name='' is no name"),
        ({"name": 3}, "name=3 is no name"),
        ({"registry": None}, "registry=None is no CollectorRegistry"),
        ({"registry": "default"}, "registry='default' is no CollectorRegistry"),
        ({"interval_s": 0}, "interval_s=0 is no time to wait: give seconds"),
        ({"interval_s": -1.0}, "interval_s=-1.0 is no time to wait"),
        ({"interval_s": None}, "interval_s=None is no time to wait"),
        ({"interval_s": "5"}, "interval_s='5' is no time to wait"),
        ({"interval_s": True}, "interval_s=True is no time to wait"),
        ({"interval_s": math.inf}, "interval_s=inf is no time to wait"),
        ({"interval_s": math.nan}, "interval_s=nan is no time to wait"),
        ({"interval_s": 10**400}, "interval_s=10+ is no time to wait"),
        ({"replay_times": "all"}, "replay_times='all' is not a bool"),
    ],
)
def test_arguments_are_checked(registry, arguments, message):
    """An argument of another kind is a ConfigError that says what to give."""
    with pytest.raises(ConfigError, match=message):
        register(CUDAGraphManager(GRID), **{"registry": registry, **arguments})
    assert list(registry.collect()) == []


def test_a_function_is_no_manager(registry):
    """A function given for its manager is told so."""
    with pytest.raises(ConfigError, match=r"give one, such as function\.manager"):
        register(bucketed(), registry=registry)


def test_the_thread_goes_on_after_an_error(registry, caplog):
    """A thread that cannot write is logged, tries again, and ends when the registration does."""
    function = bucketed()
    registration = register(function.manager, registry=registry, interval_s=1e-4)
    failing = FailingOnce(registration)
    failing._keep_updating()
    assert failing.updates == 3
    assert [record.exc_info[0] for record in caplog.records] == [OSError]
    assert "the metrics of 'default' could not be written" in caplog.text


class FailingOnce(Registration):
    """A registration whose first update fails, and whose third is the last."""

    def __init__(self, other: Registration) -> None:
        vars(self).update(vars(other))
        self.updates = 0

    def update(self) -> None:
        self.updates += 1
        if self.updates == 1:
            raise OSError("no space left")
        if self.updates == 3:
            self._over.set()
