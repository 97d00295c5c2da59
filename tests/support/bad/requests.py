"""Requests to the local Hub that no client of the Hub makes: each gets an answer that says what is wrong."""

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import NamedTuple

from .trying import Case, Tried

TOKEN = "Authorization: Bearer local\r\n"
DEEP = b"[" * 200_000
SECONDS = 20


class Request(NamedTuple):
    """What is sent: the first line without the version, headers, body; the host's own name is filled in for HOST."""

    line: str
    headers: str = ""
    body: bytes = b""
    host: str = "HOST"
    status: int = 400


def _sized(body: bytes, more: str = TOKEN) -> tuple[str, bytes]:
    return f"{more}Content-Length: {len(body)}\r\n", body


FILE = "GET /me/model/resolve/main/sub/notes.txt"
REQUESTS = {
    "a range beyond the end": Request(FILE, "Range: bytes=100-\r\n", status=416),
    "a range that begins at the end": Request(FILE, "Range: bytes=6-\r\n", status=416),
    "a foreign host": Request(FILE, host="evil.example", status=421),
    "another port": Request(FILE, host="127.0.0.1:1", status=421),
    "no host": Request(FILE, host="", status=421),
    "no such address": Request("GET /nowhere", status=404),
    "no such verb": Request("DELETE /me/model", status=501),
    "an address that is none": Request("GET http://[", status=400),
    "a path that leads out": Request("GET /me/model/resolve/main/..%2F..%2Fx", status=400),
    "half a character": Request("GET /me/model/resolve/main/%ED%A0%80", status=404),
    "a letter beyond Latin": Request("GET /me/model/resolve/main/%E2%82%AC", status=404),
    "a name without end": Request(f"GET /me/{'x' * 5000}/resolve/main/a", status=404),
    "a line without end": Request(f"GET /{'x' * 100_000}", status=414),
    "deep JSON": Request("POST /api/repos/create", *_sized(DEEP)),
    "JSON cut off": Request("POST /api/repos/create", *_sized(b'{"name": ')),
    "a list": Request("POST /api/repos/create", *_sized(b"[]")),
    "a name that is a number": Request("POST /api/repos/create", *_sized(b'{"name": {}}'), status=404),
    "no name": Request("POST /api/repos/create", *_sized(b"{}")),
    "an unknown type": Request("POST /api/repos/create", *_sized(b'{"name": "x", "type": "pet"}')),
    "no token": Request("POST /api/repos/create", *_sized(b'{"name": "x"}', more=""), status=401),
    "a token of another kind": Request(
        "POST /api/repos/create", *_sized(b'{"name": "x"}', more="Authorization: Basic eA==\r\n"), status=401
    ),
    "a deep card": Request(
        "POST /api/validate-yaml", *_sized(json.dumps({"content": "---\na: " + "[" * 9000 + "\n---\n"}).encode())
    ),
    "a card of aliases": Request(
        "POST /api/validate-yaml", *_sized(json.dumps({"content": "---\na: &a [1]\nb: *a\n---\n"}).encode())
    ),
    "a commit of a list": Request("POST /api/models/me/model/commit/main", *_sized(b"[1]")),
    "an unknown operation": Request("POST /api/models/me/model/commit/main", *_sized(b'{"key": "drop", "value": {}}')),
    "content that is no base64": Request(
        "POST /api/models/me/model/commit/main",
        *_sized(b'{"key": "file", "value": {"path": "a", "content": "x"}}'),
    ),
    "a file that was never sent": Request(
        "POST /api/models/me/model/commit/main",
        *_sized(json.dumps({"key": "lfsFile", "value": {"path": "a", "oid": "0" * 64}}).encode()),
    ),
    "an upload that nobody asked for": Request(f"PUT /lfs/{'0' * 64}", *_sized(b"x"), status=401),
    "an upload by a made-up grant": Request(f"PUT /lfs/{'0' * 64}?grant=x", *_sized(b"x"), status=401),
    "a size that is a word": Request(
        "POST /me/model.git/info/lfs/objects/batch",
        *_sized(json.dumps({"objects": [{"oid": "0" * 64, "size": "big"}]}).encode()),
    ),
    "a body beyond all": Request("POST /api/repos/create", *_sized(b"x" * (11 << 20)), status=413),
    "a length that is a word": Request("POST /api/repos/create", f"{TOKEN}Content-Length: big\r\n"),
    "a negative length": Request("POST /api/repos/create", f"{TOKEN}Content-Length: -5\r\n"),
    "a chunk whose length is a word": Request(
        "POST /api/repos/create", f"{TOKEN}Transfer-Encoding: chunked\r\n", b"zz\r\n"
    ),
    "a chunk of negative length": Request(
        "POST /api/repos/create", f"{TOKEN}Transfer-Encoding: chunked\r\n", b"-5\r\nabc"
    ),
    "chunks without end": Request(
        "POST /api/repos/create",
        f"{TOKEN}Transfer-Encoding: chunked\r\n",
        (b"100000\r\n" + b"x" * 0x100000 + b"\r\n") * 12,
        status=413,
    ),
}


def try_requests(endpoint: str) -> Iterator[Tried]:
    """Sends each to a local Hub that has the file `sub/notes.txt`, six bytes, in the model `me/model`."""
    for name, request in REQUESTS.items():
        case = Case(f"local Hub: {name}", [])
        try:
            status, answer = _answer(endpoint, request)
        except TimeoutError:
            yield Tried(case, "hang", "")
            continue
        if status is None:
            yield Tried(case, "traceback", "no answer")
        else:
            yield Tried(case, "clear" if status == request.status else "silent", f"{status}: {answer[:200]}")


def _answer(endpoint: str, request: Request) -> tuple[int | None, str]:
    host = endpoint.removeprefix("http://")
    name, _, port = host.partition(":")
    head = f"{request.line} HTTP/1.1\r\n"
    if request.host:
        head += f"Host: {request.host.replace('HOST', host)}\r\n"
    with socket.create_connection((name, int(port)), timeout=SECONDS) as connection:
        with contextlib.suppress(ConnectionError):  # it may have stopped listening, and answered
            connection.sendall(f"{head}{request.headers}Connection: close\r\n\r\n".encode("latin-1") + request.body)
            connection.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                received += piece
    first, _, _ = received.partition(b"\r\n")
    parts = first.split(b" ")
    return (int(parts[1]), received.decode("latin-1")) if len(parts) > 1 and parts[1].isdigit() else (None, "")
