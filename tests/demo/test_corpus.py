"""The paragraphs of NumPy's docstrings."""

import pytest

from cudagraph_jax.demo.corpus import MIN_WORDS, Passage, numpy_passages, paragraphs, passages

DOCSTRING = """
sort(a, axis=-1)

    Return a sorted copy
    of an array.

    Parameters
    ----------
    a : array_like
        The array to be sorted.

    See Also
    --------
    argsort : Sorts indirectly, and is listed here.

    Notes
    -----

    .. versionadded:: 1.0 with some words behind it

    The time does not depend on the order.

    Too short.

    ===== ===========================
    kind  what this table says of it
    ===== ===========================

    Examples
    --------
    >>> import numpy as np; np.sort([3, 1, 2])

    This sentence belongs to an example, too.
"""


def test_paragraphs():
    """Prose is kept, on one line each; headings, signatures, tables and examples are not."""
    assert list(paragraphs(DOCSTRING)) == [
        "Return a sorted copy of an array.",
        "a : array_like The array to be sorted.",
        "The time does not depend on the order.",
    ]


def test_summaries_come_first():
    """All first paragraphs precede all second ones, each in the order of the docstrings."""
    found = passages(
        [
            ("b", "Say the first of b.\n\nSay the second of b."),
            ("a", "Say the first of a.\n\nSay the second of a."),
        ]
    )
    assert [passage.text[8:] for passage in found] == [
        "first of b.",
        "first of a.",
        "second of b.",
        "second of a.",
    ]


def test_repeated_text():
    """A text that stands twice is one passage, under the first name."""
    text = "Return the absolute value."
    assert passages([("x.absolute", text), ("x.abs", text)]) == [Passage("x.absolute", text)]


def test_numpy_is_deterministic():
    """The passages are the same each time, and a limit takes the first of them."""
    found = numpy_passages()
    assert found == numpy_passages()
    assert numpy_passages(limit=24) == found[:24]
    assert len(found) > 2000


def test_numpy_passages():
    """Names are those that one writes, and no text stands there twice or is too short."""
    found = numpy_passages()
    names = {passage.name for passage in found}
    assert {"numpy.sort", "numpy.linalg.eig", "numpy.fft.fft", "numpy.random.normal"} <= names
    texts = [passage.text for passage in found]
    assert len(set(texts)) == len(texts)
    assert all(len(text.split()) >= MIN_WORDS for text in texts)


@pytest.mark.parametrize("mark", [">>> ", "----"])
def test_no_markup(mark):
    """Doctests and underlines are left out."""
    assert not [passage for passage in numpy_passages() if passage.text.startswith(mark)]
