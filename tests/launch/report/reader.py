"""A report as a browser reads it: matching tags, text by section, and references that would be loaded."""

import re
from html.parser import HTMLParser

_VOID = {"meta", "img"}
_LOADING = {"src", "href", "srcset", "data", "poster", "action", "xlink:href", "background"}


class Reader(HTMLParser):
    """A parser that fails on tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        """Values of attributes that name something to load."""
        self.text: dict[str, str] = {"": ""}
        """Text by section ID; the head of the page has the empty ID."""
        self._open: list[str] = []
        self._section = ""
        self.feed(page)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in _LOADING]
        if tag == "section":
            self._section = dict(attrs).get("id") or ""
            self.text[self._section] = ""
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, (tag, self.getpos())
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text[self._section] += " " + data

    def words(self, section: str = "") -> str:
        """Return the text of a section with single spaces."""
        return re.sub(r"\s+", " ", self.text[section]).strip()
