"""What a browser would fetch from elsewhere to show a page."""

from html.parser import HTMLParser
from urllib.parse import urlsplit

_SOURCES = {"audio", "embed", "iframe", "img", "input", "script", "source", "track", "video"}
_FETCHED_LINKS = {
    "dns-prefetch",
    "icon",
    "manifest",
    "modulepreload",
    "preconnect",
    "prefetch",
    "preload",
    "stylesheet",
}


def fetched_by(html: str) -> list[str]:
    """Addresses with a host of their own; those of text are followed by readers only, and are not meant."""
    parser = _Fetched()
    parser.feed(html)
    return parser.addresses


class _Fetched(HTMLParser):
    def __init__(self):
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        fetched = []
        if tag in _SOURCES:
            fetched = [found.get("src"), *(part.split()[0] for part in (found.get("srcset") or "").split(",") if part)]
        elif tag == "link" and not _FETCHED_LINKS.isdisjoint((found.get("rel") or "").lower().split()):
            fetched = [found.get("href")]
        elif tag == "object":
            fetched = [found.get("data")]
        self.addresses += [address for address in fetched if address and urlsplit(address).netloc]
