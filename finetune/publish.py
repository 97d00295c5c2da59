"""Uploading to the Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

from .recipe_values import RecipeError, first_line


def make_repo(
    repo_id: str, private: bool = True, endpoint: str | None = None, token: str | bool | None = None
) -> None:
    """Make sure that the Hub repository exists and that we may write to it, before hours of training."""
    try:
        HfApi(endpoint=endpoint, token=token).create_repo(repo_id, private=private, exist_ok=True)
    except (HTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise RecipeError(
            f"cannot write to {repo_id!r} on the Hub: {first_line(error)} (to log in: `hf auth login`)"
        ) from error


def push(folder: Path, repo_id: str, endpoint: str | None = None, token: str | bool | None = None) -> str:
    """Upload a folder to an existing repository; returns its address."""
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Fine-tuned with deepseek-moe")
    except (HTTPError, LocalTokenNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"upload to {repo_id!r} failed: {first_line(error)}; {folder} is complete, and the same command tries "
            "the upload again"
        ) from error
    return f"{api.endpoint}/{repo_id}"
