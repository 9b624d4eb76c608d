"""Checks of single values."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_jax._base.checks import count, nearest, positive_size, require_bool, require_choice
from cudagraph_jax.errors import ConfigError

NO_INTEGERS = [True, False, np.True_, 1.0, 0.0, np.float32(2), "3", b"3", "", None, (1,), [], 1j]


@given(st.integers(min_value=1))
def test_positive_size_keeps_sizes(size):
    """Every integer of 1 or more is a size, and comes back as an int."""
    assert positive_size(size, name="n") == size
    assert type(positive_size(np.int64(size % 2**31 + 1), name="n")) is int


@given(st.integers(max_value=0))
def test_positive_size_refuses_what_is_below_one(size):
    """No integer below 1 is a size."""
    with pytest.raises(ConfigError) as caught:
        positive_size(size, name="max_graphs")
    assert str(caught.value) == f"max_graphs={size} is below 1: give a size of 1 or more"


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_positive_size_refuses_other_types(value):
    """What is no integer is no size: the message has the name, the value and what to give."""
    with pytest.raises(ConfigError) as caught:
        positive_size(value, name="n")
    assert str(caught.value) == f"n={value!r} is not an integer: give a size of 1 or more"


@given(st.integers(min_value=0))
def test_count_keeps_counts(value):
    """Every integer of 0 or more is a count."""
    assert count("n", value) == value


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_count_refuses_other_types(value):
    """What is no integer is no count, not even a zero of another type."""
    with pytest.raises(ConfigError, match=re.escape(f"n={value!r} is not an integer")):
        count("n", value)


def test_count_says_that_zero_is_fine():
    """A negative count is told the smallest one."""
    with pytest.raises(ConfigError, match=r"^warmup_iterations=-1 is below 0: give .*0 or more"):
        count("warmup_iterations", -1)


def test_require_bool():
    """True and False pass; nothing else does."""
    require_bool("enabled", True)
    require_bool("enabled", False)
    for value in (0, 1, "True", None, np.True_):
        with pytest.raises(ConfigError) as caught:
            require_bool("enabled", value)
        assert str(caught.value) == f"enabled={value!r} is not a bool: give True or False"


def test_require_choice():
    """A choice passes; anything else is told the nearest one, or all of them."""
    require_choice("on_miss", "eager", iter(("capture", "eager")))
    with pytest.raises(ConfigError) as caught:
        require_choice("on_miss", "captured", iter(("capture", "eager")))
    assert str(caught.value) == (
        "on_miss='captured' is unknown: did you mean 'capture'? (capture, eager)"
    )


@pytest.mark.parametrize("value", ["zzz", 7, None, ("capture",)])
def test_nearest_lists_all_where_none_is_near(value):
    """Where nothing comes near, all the choices are listed."""
    assert nearest(value, ["abc", "def"]) == "choose one of abc, def"
