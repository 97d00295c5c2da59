"""What pip knows of this package: where it comes from, and which releases of other libraries go with it.

Nobody is told to install it by its bare name: a name that an index does not have can be registered there by anybody.
"""

import importlib.metadata
import re
from urllib.parse import urlsplit

NAME = "deepseek-moe"


def how_to_install() -> str:
    """What to type to install this package, by the address in pyproject.toml; words while that is a placeholder."""
    address = repository_address()
    return f'pip install "{NAME} @ git+{address}"' if address else f"the package {NAME}, installed from its repository"


def install(library: str) -> str:
    """The command that installs a library of an extra, in a release that works with this package."""
    wanted = (line.partition(";")[0].strip() for line in _metadata("Requires-Dist"))
    requirement = next((line for line in wanted if _names(line, library)), library)
    return f"pip install '{requirement}'"


def repository_address() -> str | None:
    """The repository's address in pyproject.toml; None while that is a placeholder."""
    for line in _metadata("Project-URL"):
        label, _, address = line.partition(",")
        # Names under .invalid belong to nobody (RFC 6761): pyproject.toml has one until there is a repository.
        host = urlsplit(address.strip()).hostname or ""
        if label.strip() == "Repository" and host.rpartition(".")[2] != "invalid":
            return address.strip()
    return None


def _metadata(field: str) -> list[str]:
    try:
        return importlib.metadata.metadata(NAME).get_all(field) or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return []


def _names(requirement: str, library: str) -> bool:
    name = re.match(r"[\w.-]+", requirement)
    return bool(name) and re.sub(r"[-_.]+", "-", name[0]).lower() == re.sub(r"[-_.]+", "-", library).lower()
