"""A small Hugging Face Hub on this machine, for pushing and pulling without a network.

It speaks the part of the Hub's HTTP API that the real `huggingface_hub` client needs: create a repository, upload
inside a commit or by git-LFS, list files, download. `hub_store.py` says what it keeps on disk.

Writing, and reading a private repository, asks for a token as the Hub does; any token is accepted and none is kept or
printed. The server listens on 127.0.0.1 only, and answers no request that was meant for another host, as one is that a
web page sends by a name which it lets point here.
"""

import base64
import json
import os
import re
import secrets
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from modeling_deepseek_moe.model_cards.metadata import problems

from ..errors import UserError
from ..recipe.values import read_yaml
from .hub_bodies import PIECE, ReadsBodies
from .hub_store import Blobs, HubError, Repo, bad_request, safe_path, tree

_MOST_OF_A_COMMIT = 1 << 30  # files that do not travel by git-LFS are in it


class _Handler(ReadsBodies, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte
    server: "_Server"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: request lines do not belong in a training log."""

    def serve(self) -> None:
        self.body = self.pieces()
        try:
            try:
                self._act()
            except HubError as error:
                message = ascii(str(error))[1:-1]
                headers = {"X-Error-Code": error.code, "X-Error-Message": message, **error.headers}
                self.answer({"error": str(error)}, error.status, headers)
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                self.answer({"error": f"malformed request: {error!r}"}, HTTPStatus.BAD_REQUEST)
            self.drain()
        except (ConnectionError, TimeoutError):  # there is nobody to answer any more
            self.close_connection = True
        except (HubError, ValueError):  # the rest of a body cannot be told from the next request
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def _act(self) -> None:
        if self.headers.get("Host", "") not in self.server.hosts:
            message = f"this local Hub is {self.server.endpoint}, and answers under no other name"
            raise HubError(HTTPStatus.MISDIRECTED_REQUEST, "WrongHost", message)
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        action, parts = _route(self.command, url.path)
        action(self, **parts)

    def answer(self, body: Any, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.start(status, {"Content-Type": "application/json", **(headers or {})}, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def start(self, status: HTTPStatus, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def need_token(self) -> None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or not token.strip():
            raise HubError(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "this needs a token; any will do on a local Hub")

    def find(self, kind: str, repo: str, revision: str = "", write: bool = False) -> tuple[Repo, str, dict[str, Any]]:
        found = Repo(self.server.root, kind or "model", repo)
        if not found.exists():
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", f"no {found.kind} {repo} on this local Hub")
        oid, commit = found.read(revision or "main")
        if write or commit["private"]:
            self.need_token()
        return found, oid, commit

    def create(self) -> None:
        self.need_token()
        request = json.loads(self.content())
        kind, user = request.get("type") or "model", request.get("organization") or "local"
        if kind not in ("model", "dataset", "space"):
            raise bad_request(f"type {kind!r} is none of model, dataset, space")
        repo = Repo(self.server.root, kind, f"{user}/{request['name']}")
        url = f"{self.server.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo.repo_id}"
        with self.server.lock:
            if repo.exists():
                return self.answer({"error": "You already created this repo", "url": url}, HTTPStatus.CONFLICT)
            repo.commit({}, request.get("visibility") == "private", None, "initial commit")
        self.answer({"url": url, "name": repo.repo_id})

    def validate_yaml(self) -> None:
        header = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", json.loads(self.content())["content"], re.DOTALL)
        try:
            fields = read_yaml(header[1], "the card") if header else {}
        except UserError as error:
            body = {"errors": [{"message": str(error)}], "warnings": []}
            return self.answer(body, HTTPStatus.BAD_REQUEST)
        if found := problems({} if fields is None else fields):
            body = {"errors": [{"message": message} for message in found], "warnings": []}
            return self.answer(body, HTTPStatus.BAD_REQUEST)
        self.answer({"errors": [], "warnings": []})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        _, _, commit = self.find(kind, repo, revision, write=True)
        rows = []
        for file in json.loads(self.content())["files"]:
            known = commit["files"].get(safe_path(file["path"]))
            lfs = self.server.lfs and file["size"] > 0 and file["path"].endswith(".safetensors")
            row = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            rows.append(row | ({"oid": known["sha256" if lfs else "oid"]} if known else {}))
        self.answer({"files": rows})

    def lfs_batch(self, kind: str, repo: str) -> None:
        self.find(kind, repo, write=True)
        objects = []
        for wanted in json.loads(self.content())["objects"]:
            row = {"oid": wanted["oid"], "size": int(wanted["size"])}
            if not self.server.blobs.path(wanted["oid"]).is_file():
                href = f"{self.server.endpoint}/lfs/{wanted['oid']}?grant={self.server.grant(row['oid'], row['size'])}"
                row["actions"] = {"upload": {"href": href}}
            objects.append(row)
        self.answer({"transfer": "basic", "objects": objects})

    def put_blob(self, sha256: str) -> None:
        """Takes a large file; the address handed out by the batch call is itself the permission, as on the Hub."""
        size = self.server.granted(self.query.get("grant", [""])[0], sha256)
        if size is None:
            message = "no upload of this file was asked for with a token"
            raise HubError(HTTPStatus.UNAUTHORIZED, "RepoNotFound", message)
        self.server.blobs.add_stream(sha256, self.limited(size))
        self.answer({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        self.find(kind, repo, revision, write=True)
        rows = [json.loads(line) for line in self.content(_MOST_OF_A_COMMIT).splitlines() if line.strip()]
        with self.server.lock:
            found, parent, commit = self.find(kind, repo, revision, write=True)
            files, title = commit["files"], ""
            for key, value in ((row["key"], row["value"]) for row in rows):
                if key == "header":
                    title = value["summary"]
                elif key == "file":
                    files[safe_path(value["path"])] = self.server.blobs.add(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    files[safe_path(value["path"])] = self.server.blobs.lfs_entry(value["oid"])
                elif key in ("deletedFile", "deletedFolder"):
                    gone = value["path"].rstrip("/")
                    files = {p: e for p, e in files.items() if p != gone and not p.startswith(f"{gone}/")}
                else:
                    raise bad_request(f"unknown operation {key!r} in a commit")
            oid = found.commit(files, commit["private"], parent, title)
        self.answer({"commitOid": oid, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{oid}"})

    def info(self, kind: str, repo: str, revision: str) -> None:
        _, oid, commit = self.find(kind, repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit["files"])]
        body = {"id": repo, "sha": oid, "private": commit["private"], "siblings": siblings, "tags": []}
        self.answer(body | {"disabled": False, "gated": False, "downloads": 0, "likes": 0})

    def list_tree(self, kind: str, repo: str, revision: str, below: str) -> None:
        _, _, commit = self.find(kind, repo, revision)
        rows = tree(commit["files"], below, self.query.get("recursive", ["false"])[0].lower() in ("true", "1"))
        if below and not rows:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{repo} has no folder {below!r}")
        self.answer(rows)

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        _, _, commit = self.find(kind, repo, revision)
        wanted = parse_qs(self.content().decode()).get("paths", [])
        self.answer([row for row in tree(commit["files"]) if row["path"] in wanted])

    def resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        _, oid, commit = self.find(kind, repo, revision)
        entry = commit["files"].get(safe_path(path))
        if entry is None:
            message = f"{repo} has no file {path!r} at revision {revision}"
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", message, {"X-Repo-Commit": oid})
        size = entry["size"]
        etag = entry["oid"] if entry["pointer"] is None else entry["sha256"]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        if entry["pointer"] is not None:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(size)}
        first, last, status = 0, size - 1, HTTPStatus.OK
        part = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})", self.headers.get("Range", ""))
        if part and int(part[1]) <= int(part[2] or part[1]):  # else the whole file, as of a range that is none
            first, last, status = int(part[1]), min(int(part[2] or size), size - 1), HTTPStatus.PARTIAL_CONTENT
            if first >= size:
                message = f"{path!r} has {size} bytes, and none from {first} on"
                status, headers = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{size}"}
                raise HubError(status, "BadRange", message, headers)
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.start(status, headers, left := last - first + 1)
        if self.command == "HEAD":
            return
        with self.server.blobs.path(entry["sha256"]).open("rb") as file:
            file.seek(first)
            while left > 0 and (piece := file.read(min(left, PIECE))):
                left -= len(piece)
                self.wfile.write(piece)


_API = r"/api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)"
_WEB = r"/(?:(?P<kind>dataset|space)s/)?(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("GET", _API + r"(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<below>.+))?", _Handler.list_tree),
    ("POST", _WEB + r"\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<sha256>[^/]+)", _Handler.put_blob),
    ("GET HEAD", _WEB + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)


def _route(command: str, path: str) -> tuple[Any, dict[str, str]]:
    for commands, pattern, action in _ROUTES:
        if command in commands.split() and (match := re.fullmatch(pattern, path)):
            return action, {name: unquote(value) for name, value in match.groupdict(default="").items()}
    raise HubError(HTTPStatus.NOT_FOUND, "NotFound", f"this local Hub has no {command} {path}")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path, lfs: bool):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.lfs, self.blobs, self.lock = root, lfs, Blobs(root), threading.Lock()
        port = self.server_address[1]
        self.endpoint, self.hosts = f"http://127.0.0.1:{port}", {f"127.0.0.1:{port}", f"localhost:{port}"}
        self._grants: dict[str, tuple[str, int]] = {}

    def grant(self, sha256: str, size: int) -> str:
        """What an address must say to which a file of this digest may be sent."""
        name = secrets.token_urlsafe()
        self._grants[name] = sha256, size
        return name

    def granted(self, name: str, sha256: str) -> int | None:
        """The size of the file that may be sent there; None if none may."""
        digest, size = self._grants.get(name, ("", 0))
        return size if digest == sha256 else None


class LocalHub:
    """A Hub on a free port of 127.0.0.1 while the `with` block runs; its folder stays afterwards.

    In the same process pass its address: `HfApi(endpoint=hub.endpoint, token="local")`. `from_pretrained("user/name")`
    takes the address from `HF_ENDPOINT`, which `huggingface_hub` reads once at import, so loading by name belongs in a
    subprocess started with `env=hub.environment(...)`.

    Args:
        root: folder for repositories and files; made if missing, and may hold those of an earlier server.
        lfs: `*.safetensors` travel by git-LFS instead of inside the commit. Clients that have `hf_xet` then need
            `HF_HUB_DISABLE_XET=1`, because this server does not speak Xet.
    """

    def __init__(self, root: str | os.PathLike[str], lfs: bool = False):
        self._server = _Server(Path(root), lfs)
        self.endpoint: str = self._server.endpoint
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "LocalHub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: str | os.PathLike[str]) -> dict[str, str]:
        """This process's environment, with the Hugging Face variables that send a subprocess to this Hub.

        Args:
            home: the subprocess's cache folder (`HF_HOME`); an empty one proves that files came over HTTP.
        """
        elsewhere = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_CACHE"}
        kept = {name: value for name, value in os.environ.items() if name not in elsewhere}
        no_proxy = ",".join(filter(None, [kept.get("NO_PROXY"), "127.0.0.1"]))
        hub = {"HF_ENDPOINT": self.endpoint, "HF_HOME": os.fspath(home), "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **hub, "NO_PROXY": no_proxy, "no_proxy": no_proxy}
