"""Uploading to the Hub: claiming a repository, sending a folder, trying again; no message has a token in it."""

import contextlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
)

from ..errors import UserError, first_line

RECORD = "deepseek_moe_run.json"
_WAITS = (2, 8, 30, 120)  # seconds before each further try
_PASSING = (408, 409, 412, 429)  # and 5xx: another try may succeed
HUB_FAILURES = (HTTPError, LocalTokenNotFoundError, OSError, ValueError, RuntimeError)
# Git makes it with the repository.
_OF_THE_HUB = (".gitattributes",)
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_SECRETS = re.compile(r"hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|(?<=Bearer )[^\s'\"]+|(?<=://)[^/\s@]+(?=@)")


@dataclass(frozen=True)
class Contents:
    """What a repository holds, as the file `deepseek_moe_run.json` in it says.

    Attributes:
        run: which run it came from, or which files, as `staging` counts them.
        kind: adapter, model, code or the name of a model type.
    """

    run: str
    kind: str

    def text(self) -> str:
        """What the file says."""
        return json.dumps(asdict(self), indent=2) + "\n"


def check_repo(
    repo_id: str,
    private: bool | None = None,
    endpoint: str | None = None,
    token: str | bool | None = None,
    contents: Contents | None = None,
    force: bool = False,
) -> None:
    """Make sure that a repository is free for these contents; nothing is written.

    Args:
        repo_id: `user/name`.
        private: what an existing one must be, if that matters.
        endpoint, token: address of the Hub and token for it; by default what `hf auth login` left.
        contents: what will be pushed.
        force: it may hold anything.

    Raises:
        UserError: it is not, or cannot be asked for.
    """
    if not _REPOSITORY.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is not the name of a repository: give USER/NAME")
    if not (token or get_token()):
        raise UserError(f"no token to write to {repo_id!r}: run `hf auth login`")
    api = HfApi(endpoint=endpoint, token=token)
    with _spoken("ask for", repo_id, token):
        if not api.repo_exists(repo_id):
            return
        if private is not None and bool(api.model_info(repo_id).private) != private:
            raise UserError(
                f"{repo_id} is {'public' if private else 'private'} already, and a push does not change that: change "
                "it in its settings on the Hub"
            )
        if contents and not force and (holds := _stranger(api, repo_id, contents)):
            raise UserError(
                f"{repo_id} holds {holds}: give another name, or --force to replace everything in it (older commits "
                "stay in its history)"
            )


def make_repo(
    repo_id: str,
    private: bool = True,
    endpoint: str | None = None,
    token: str | bool | None = None,
    contents: Contents | None = None,
) -> None:
    """Make sure that the Hub repository exists and that we may write to it, before hours of training.

    Args:
        repo_id: `user/name`.
        private: who can see a repository that is made now.
        endpoint, token: address of the Hub and token for it; by default what `hf auth login` left.
        contents: what will be pushed: a first commit says so, by which an upload that was stopped is known again.

    Raises:
        UserError: the Hub refuses.
    """
    api = HfApi(endpoint=endpoint, token=token)
    with _spoken("write to", repo_id, token):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if contents and _record(api, repo_id) != contents:
            record = contents.text().encode()
            api.upload_file(
                path_or_fileobj=record, path_in_repo=RECORD, repo_id=repo_id, commit_message="For deepseek-moe"
            )


def push(
    folder: Path,
    repo_id: str,
    endpoint: str | None = None,
    token: str | bool | None = None,
    replace: tuple[str, ...] = (),
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Upload a folder to an existing repository, again and again while the Hub is out of order.

    Files that the Hub already has are not sent again, so a later call goes on where one was stopped.

    Args:
        folder: everything in it is uploaded.
        repo_id: `user/name`.
        endpoint, token: address of the Hub and token for it; by default what `hf auth login` left.
        replace: patterns of files that the repository loses in the same commit, unless the folder has them.
        sleep: waits so many seconds between two tries.

    Returns:
        The repository's address.

    Raises:
        UserError: the Hub refused, or the last try failed.
    """
    api = HfApi(endpoint=endpoint, token=token)
    for wait in (*_WAITS, None):
        try:
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message="Fine-tuned with deepseek-moe",
                delete_patterns=list(replace) or None,
            )
            return f"{api.endpoint}/{repo_id}"
        except HUB_FAILURES as error:
            if wait is None or not _may_pass(error):
                reason = without_secrets(_reason(error), token)
                raise UserError(
                    f"upload to {repo_id!r} failed: {reason}; {folder} is complete, and the same command goes on with "
                    "the upload"
                ) from None
        sleep(wait)
    raise AssertionError("the last try returns or raises")


def read_file(repo_id: str, name: str, endpoint: str | None = None, token: str | bool | None = None) -> str:
    """The text of a repository's file; empty if it has none of that name, or the Hub does not give it."""
    with tempfile.TemporaryDirectory() as fresh:
        try:
            path = HfApi(endpoint=endpoint, token=token).hf_hub_download(repo_id, name, local_dir=fresh)
            return Path(path).read_text(encoding="utf-8")
        except HUB_FAILURES:
            return ""


def without_secrets(text: str, token: str | bool | None = None) -> str:
    """The text with `***` for every token in it: the one given, the one logged in with, and what looks like one."""
    for known in (token, get_token()):
        if isinstance(known, str) and len(known) > 3:
            text = text.replace(known, "***")
    return _SECRETS.sub("***", text)


@contextlib.contextmanager
def _spoken(what: str, repo_id: str, token: str | bool | None) -> Iterator[None]:
    """Errors of the Hub's client in one line; from None, since a traceback would print the tokens in the original."""
    try:
        yield
    except UserError:
        raise
    except HUB_FAILURES as error:
        reason = without_secrets(first_line(error), token)
        raise UserError(f"cannot {what} {repo_id!r} on the Hub: {reason} (to log in: `hf auth login`)") from None


def _stranger(api: HfApi, repo_id: str, contents: Contents) -> str:
    """What the repository holds, in words, if that is not of `contents`; nothing if it is."""
    there = [name for name in api.list_repo_files(repo_id) if name not in (*_OF_THE_HUB, RECORD)]
    if not there:
        return ""
    known = _record(api, repo_id)
    if known is None:
        shown = ", ".join(there[:3]) + (f" and {len(there) - 3} more files" if len(there) > 3 else "")
        return f"something that deepseek-moe did not push ({shown})"
    if known.run != contents.run:
        return f"the {_named(known.kind)} of another run ({len(there)} files)"
    return "" if known.kind == contents.kind else f"this run too, but as {_named(known.kind)}"


def _named(kind: str) -> str:
    return {"adapter": "adapter", "model": "model", "code": "model with its code"}.get(kind, f"{kind} model")


def _record(api: HfApi, repo_id: str) -> Contents | None:
    with tempfile.TemporaryDirectory() as fresh:  # the cache would answer for a Hub that does not
        try:
            fields = json.loads(Path(api.hf_hub_download(repo_id, RECORD, local_dir=fresh)).read_bytes())
            return Contents(str(fields["run"]), str(fields["kind"]))
        except (RemoteEntryNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _may_pass(error: BaseException) -> bool:
    """Whether another try may succeed: the network or the Hub was out of order, rather than we refused."""
    answers = [cause.response for cause in _causes(error) if isinstance(cause, HfHubHTTPError)]
    if answers and answers[-1] is not None:
        return answers[-1].status_code in _PASSING or answers[-1].status_code >= 500
    return any(isinstance(cause, HTTPError | ConnectionError | TimeoutError) for cause in _causes(error))


def _reason(error: BaseException) -> str:
    """What was told at the source of a chain of errors; the client's last one may only say which file it was."""
    return ": ".join(dict.fromkeys(first_line(cause) for cause in _causes(error)))
