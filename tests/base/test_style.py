"""How HTML looks."""

import re

from cudagraph_jax._base.html import CLASS, STYLE, styled
from tests.helpers.html_reader import Reader


def test_touches_nothing_outside_its_class():
    """Every rule is below the class, so that a notebook's own tables stay as they are."""
    rules = re.sub(r"@media print\{(.*\}\s*)\}", r"\1", STYLE, flags=re.DOTALL)
    selectors = re.findall(r"([^{}]+)\{[^{}]*\}", rules)
    assert len(selectors) > 20
    for selector in ",".join(selectors).replace("\n", "").split(","):
        assert selector.strip().startswith(f".{CLASS}."), selector


def test_sets_no_colour_of_text():
    """Text has the colour of the page around it, so that it is legible on light and on dark."""
    assert not re.search(r"[{;]color:(?!inherit)", STYLE)


def test_asks_for_nothing_from_elsewhere():
    """No address and no import is in it."""
    assert not re.search(r"//|url\(|@import", STYLE)


def test_styled():
    """Fragments stand in one element of that class, with the CSS."""
    html = styled("<p>1</p>", "<p>2</p>")
    assert html.startswith(f'<div class="{CLASS}"><style>')
    assert html.endswith("</style><p>1</p><p>2</p></div>")
    assert Reader(html).all("p") == ["1", "2"]
