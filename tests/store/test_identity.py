"""What identifies an executable, and where two identities differ."""

from enum import IntEnum, StrEnum

import pytest

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.store.identity import Difference, differences, file_name, in_words, plain


def taken(values, *, nested=False):
    return plain(values, name="identity", nested=nested)


def test_file_name():
    """The name depends on every field and its type, and not on the order of fields."""
    assert file_name({"a": 1, "b": [2, None]}) == file_name({"b": [2, None], "a": 1})
    values = [1, 1.0, True, "1", [1], None, 0, -0.0, 0.0, False, ""]
    assert len({file_name({"a": value}) for value in values}) == len(values)


def test_file_name_is_fixed():
    """The name of an identity is the same in every version: a store outlives them."""
    assert file_name({"name": "embed", "bucket": [8, 128]}) == (
        "ad520515b2aacd1b83ed08d5f6a89871.graph"
    )


def test_plain_is_what_a_file_gives_back():
    """Enumerations become their values and tuples lists, as in JSON."""

    class Size(IntEnum):
        LARGE = 9

    class Kind(StrEnum):
        CPU = "cpu"

    taken_values = taken({"a": Size.LARGE, "b": Kind.CPU, "c": (1, ("x",)), "d": 1.5})
    assert taken_values == {"a": 9, "b": "cpu", "c": [1, ["x"]], "d": 1.5}
    assert [type(value) for value in taken_values.values()] == [int, str, list, float]


def test_nested():
    """Mappings are taken only where they are asked for."""
    assert taken({"a": {"b": [{"c": 1}]}}, nested=True) == {"a": {"b": [{"c": 1}]}}
    with pytest.raises(ConfigError, match=r"identity\['a'\]={'b': 1} cannot stand in a header"):
        taken({"a": {"b": 1}})


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([1], "is no mapping of text to values: give a dict"),
        ({1: 2}, "is no mapping of text to values: give a dict"),
        ({"a": float("nan")}, r"identity\['a'\]=nan cannot stand in a header: give text"),
        ({"a": float("inf")}, "cannot stand in a header"),
        ({"a": b"x"}, "cannot stand in a header"),
        ({"a": {1}}, "cannot stand in a header"),
        ({"a": [object]}, "cannot stand in a header"),
        ({"a": 1 << 5000}, r"identity\['a'\] is an integer of 5001 bits: give a hash of it"),
    ],
)
def test_errors(values, problem):
    """What a header cannot hold is a configuration error that names the field."""
    with pytest.raises(ConfigError, match=problem):
        taken(values)


def test_endless_list():
    """A list that holds itself is an error, not a crash."""
    endless: list = []
    endless.append(endless)
    with pytest.raises(ConfigError, match="nested more than 32 deep"):
        taken({"a": endless})


def test_differences():
    """Fields differ by value and by type, or are missing on one side; the words say which."""
    found = differences({"a": 1, "b": "x", "c": True, "e": [1]}, {"a": 1, "c": 1, "d": 0, "e": [1]})
    assert found == (
        Difference("b", '"x"', None),
        Difference("c", "true", "1"),
        Difference("d", None, "0"),
    )
    assert in_words(found) == 'b "x", not missing and c true, not 1 and d missing, not 0'
    assert str(Difference("hlo", '"' + "x" * 99, "1")) == f'hlo "{"x" * 56}..., not 1'
    assert differences({"a": 1}, {"a": 1}) == ()
