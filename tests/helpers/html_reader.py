"""Reads HTML as a browser would, strictly: every element that is opened is closed."""

from __future__ import annotations

from html.parser import HTMLParser

from cudagraph_jax._base.text import one_line

VOID = {"meta"}
PLAIN = {
    "b", "body", "caption", "dd", "div", "dl", "dt", "h1", "h2", "head", "header", "html", "main",
    "meta", "p", "section", "span", "style", "table", "tbody", "td", "th", "thead", "title", "tr",
}  # fmt: skip
ATTRIBUTES = {
    "aria-label", "charset", "class", "content", "lang", "name", "role", "scope", "tabindex",
    "title",
}  # fmt: skip


def shown(text: str) -> str:
    """A text as a page has it: its lines, without what would act on a terminal."""
    return "\n".join(map(one_line, text.split("\n")))


class Reader(HTMLParser):
    """The elements, the attributes and the text of a document.

    Attributes:
        texts: For each element, in the order in which they begin, its name and its own text.
        titles: What is shown for a cell that is pointed at.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[list[str]] = []
        self.titles: list[str] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        assert tag in PLAIN, tag
        assert {name for name, _ in attrs} <= ATTRIBUTES
        self.titles += [value for name, value in attrs if name == "title"]
        self.texts.append([tag, ""])
        if tag not in VOID:
            self._open.append(len(self.texts) - 1)

    def handle_endtag(self, tag):
        assert self.texts[self._open.pop()][0] == tag

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]][1] += data

    def all(self, *tags: str) -> list[str]:
        """The texts of all elements of these names."""
        return [text for tag, text in self.texts if tag in tags]
