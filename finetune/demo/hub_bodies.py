"""Bodies of requests to a local Hub: read piece by piece, and never more than is expected."""

from collections.abc import Iterator
from http import HTTPStatus

from .hub_store import HubError, bad_request

PIECE = 1 << 20
_MOST_OF_JSON = 10 << 20
_DRAINED = 4 << 20


class ReadsBodies:
    """What a handler of requests needs for them; comes before `BaseHTTPRequestHandler` among the bases."""

    def drain(self) -> None:
        """The connection is used again: leaves nothing of this request in it, or closes it if that is much."""
        left = _DRAINED
        for piece in self.body:
            left -= len(piece)
            if left < 0:
                self.close_connection = True
                return

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes; a HubError where its length is no number."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := self._number(self.rfile.readline(100).split(b";")[0].strip().decode("latin-1"), 16):
                yield from self._read(size)
                self.rfile.readline(100)
            self.rfile.readline(100)
            return
        yield from self._read(self._number(self.headers.get("Content-Length", "0"), 10))

    def _number(self, text: str, base: int) -> int:
        try:
            if text.isalnum():
                return int(text, base)
        except ValueError:
            pass
        self.close_connection = True  # where the next request begins is not known
        raise bad_request(f"the length {text!r} of a body is no number")

    def _read(self, left: int) -> Iterator[bytes]:
        while left > 0 and (piece := self.rfile.read(min(left, PIECE))):
            left -= len(piece)
            yield piece

    def limited(self, most: int) -> Iterator[bytes]:
        """The body, if it is no longer than that."""
        read = 0
        for piece in self.body:
            read += len(piece)
            if read > most:
                self.close_connection = True
                message = f"a body of more than {most:,} bytes"
                raise HubError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "TooLarge", message)
            yield piece

    def content(self, most: int = _MOST_OF_JSON) -> bytes:
        """The whole body, if it is no longer than that."""
        return b"".join(self.limited(most))
