"""What a local Hub keeps on disk: repositories as chains of commits over a pool of blobs.

    root/blobs/<sha256>                                file contents
    root/repos/<type>s/<user>/<name>/main              id of the newest commit
    root/repos/<type>s/<user>/<name>/<commit>.json     parent, title, private, files: path -> entry

An entry holds sha256, size, git's object id and, for a file that came by git-LFS, the size of its pointer. Files are
written under another name and renamed, so a killed server leaves no half commit.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubError(Exception):
    """An answer other than 2xx: the status, the Hub's `X-Error-Code` and one sentence."""

    def __init__(self, status: HTTPStatus, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


def bad_request(message: str) -> HubError:
    """The answer to a request that cannot be understood."""
    return HubError(HTTPStatus.BAD_REQUEST, "BadRequest", message)


def safe_path(path: str) -> str:
    """`path` itself if it stays inside a repository."""
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise bad_request(f"{path!r} is not a path inside a repository")
    return path


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Blobs:
    """File contents, named by their SHA-256."""

    def __init__(self, root: Path):
        self.folder = root / "blobs"
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where the blob of this digest is, if it is there."""
        if not _SHA256.fullmatch(sha256):
            raise bad_request(f"{sha256!r} is not a SHA-256")
        return self.folder / sha256

    def add_stream(self, sha256: str, pieces: Iterable[bytes]) -> None:
        """Stores the pieces as the blob `sha256`; a bad request if that is not their digest."""
        blob, digest = self.path(sha256), hashlib.sha256()
        unfinished = blob.with_name(f"{sha256}.{secrets.token_hex(4)}.tmp")
        try:
            with unfinished.open("wb") as file:
                for piece in pieces:
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() != sha256:
                raise bad_request(f"the bytes sent are not those of {sha256}")
            os.replace(unfinished, blob)
        finally:
            unfinished.unlink(missing_ok=True)

    def add(self, content: bytes) -> dict[str, Any]:
        """Stores a regular file, and returns its entry."""
        sha256 = hashlib.sha256(content).hexdigest()
        _replace(self.path(sha256), content)
        return {"sha256": sha256, "size": len(content), "oid": _git_oid(content), "pointer": None}

    def lfs_entry(self, sha256: str) -> dict[str, Any]:
        """The entry of a file that came by LFS: git's object is a pointer to it."""
        blob = self.path(sha256)
        if not blob.is_file():
            raise bad_request(f"{sha256} was never uploaded")
        size = blob.stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return {"sha256": sha256, "size": size, "oid": _git_oid(pointer), "pointer": len(pointer)}


class Repo:
    """One repository of type `kind` (model, dataset, space). It may not exist yet."""

    def __init__(self, root: Path, kind: str, repo_id: str):
        user, _, name = repo_id.partition("/")
        if not _SEGMENT.fullmatch(user) or not _SEGMENT.fullmatch(name):
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", f"{repo_id!r} is not of the form user/name")
        self.kind, self.repo_id, self.folder = kind, repo_id, root / "repos" / f"{kind}s" / user / name

    def exists(self) -> bool:
        """Whether it has a commit."""
        return (self.folder / "main").is_file()

    def commit(self, files: dict[str, Any], private: bool, parent: str | None, title: str) -> str:
        """Add a commit with exactly these files and make it `main`; returns its id."""
        record = {"parent": parent, "title": title, "private": private, "files": files}
        body = json.dumps(record, sort_keys=True).encode()
        oid = hashlib.sha1(secrets.token_bytes(8) + body, usedforsecurity=False).hexdigest()
        _replace(self.folder / f"{oid}.json", body)
        _replace(self.folder / "main", oid.encode())
        return oid

    def read(self, revision: str) -> tuple[str, dict[str, Any]]:
        """Commit id and record of `main` or of a commit id."""
        oid = (self.folder / "main").read_text() if revision == "main" else revision
        path = self.folder / f"{oid}.json"
        if not _COMMIT.fullmatch(oid) or not path.is_file():
            message = f"{self.repo_id} has no revision {revision!r} (try 'main')"
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", message)
        return oid, json.loads(path.read_text())


def tree(files: dict[str, Any], below: str = "", recursive: bool = True) -> list[dict[str, Any]]:
    """Rows of the Hub's tree listing: the folders, then the files, that lie under the folder `below`."""
    prefix, rows, folders = f"{below}/" if below else "", [], set()
    for path, entry in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parents = path[len(prefix) :].split("/")[:-1]
        depth = len(parents) if recursive else min(1, len(parents))
        folders |= {prefix + "/".join(parents[: i + 1]) for i in range(depth)}
        if recursive or not parents:
            row = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
            if entry["pointer"] is not None:
                row["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": entry["pointer"]}
            rows.append(row)
    return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)] + rows
