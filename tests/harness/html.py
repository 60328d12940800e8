"""Pages of HTML, parsed, and what they may hold; texts that would be markup if nothing escaped them."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</div></article></style></title><!-- <svg onload=alert(1)>",
    "$summary ${files} &lt;b&gt; ]]>",
    "\x00\x1b[31m\r\u202eright to left\u2028",
)
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "type", "id", "for", "href", "class", "title"}
ATTRIBUTES |= {"viewbox", "width", "height", "role", "aria-label", "x", "y", "rx", "src", "alt", "controls", "preload"}
ATTRIBUTES |= {"preserveaspectratio"}
TAGS = {"html", "head", "meta", "title", "style", "body", "input", "h1", "h2", "h3", "div", "table", "thead", "tbody"}
TAGS |= {"tr", "th", "td", "label", "span", "mark", "main", "section", "p", "svg", "g", "rect", "text", "article", "b"}
TAGS |= {"i", "s", "figure", "figcaption", "a", "img", "audio", "video", "br"}


class Page(HTMLParser):
    """Elements of a page, its text, the text of each token, and what is learned of that."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tokens: list[str] = []
        self.learned = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.tokens += [""] * (tag == "i")
        if tag not in ("meta", "input", "img", "rect", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "i" in self.open:
            self.tokens[-1] += data
            self.learned += data if "mark" in self.open else ""

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
