"""Which experts each token goes to: as in a file of real routing, drawn uniformly, or by Zipf's law."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# Of DeepSeek-V2-Lite; the tiny size has as many, so that it takes the same files. GLM-4.7-Flash has as many experts,
# of which a token takes 4.
NUM_EXPERTS, TOP_K = 64, 6
ZIPF_EXPONENT = 0.5


class RoutingFileError(ValueError):
    """A routing file that cannot be read; the message names the line."""


def read_routing(path: Path, num_experts: int = NUM_EXPERTS, top_k: int = TOP_K) -> list[list[int]]:
    """The chosen experts of every token in the file.

    Args:
        path: one line a sequence: expert ids, `top_k` a token, joined by tabs; two tabs; the gate values in the same
            order. That is how DeepSeek's ESFT publishes routing.
        num_experts: ids lie below.
        top_k: experts a token.

    Raises:
        RoutingFileError: the file does not exist, is empty, or has a line that is not like that.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RoutingFileError(f"cannot read routing file {path}: {error}") from error
    tokens: list[list[int]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tokens += _tokens(line, num_experts, top_k)
        except ValueError as error:
            raise RoutingFileError(f"routing file {path}, line {number}: {error}") from error
    if not tokens:
        raise RoutingFileError(f"routing file {path} has no tokens: give a file with one line a sequence")
    return tokens


def _tokens(line: str, num_experts: int, top_k: int) -> list[list[int]]:
    ids_text, separator, gates_text = line.partition("\t\t")
    if not separator:
        raise ValueError("no double tab between expert ids and gate values")
    ids = [int(word) for word in ids_text.split("\t")]
    gates = [float(word) for word in gates_text.split("\t")]
    if len(ids) != len(gates):
        raise ValueError(f"{len(ids)} expert ids but {len(gates)} gate values")
    if len(ids) % top_k:
        raise ValueError(f"{len(ids)} expert ids are not a multiple of {top_k} a token")
    tokens = [ids[start : start + top_k] for start in range(0, len(ids), top_k)]
    for place, chosen in enumerate(tokens, 1):
        if outside := [expert for expert in chosen if not 0 <= expert < num_experts]:
            raise ValueError(f"expert id {outside[0]} of token {place} is not one of 0 to {num_experts - 1}")
        if len(set(chosen)) < top_k:
            raise ValueError(f"token {place} chooses an expert twice: {chosen}")
    return tokens


class Routing:
    """Draws chosen experts `[tokens, K]`; another seed gives another draw of the same distribution."""

    def __init__(self, num_experts: int, top_k: int, tokens: list[list[int]] | None = None):
        self.num_experts, self.top_k, self.tokens = num_experts, top_k, tokens

    def draw(self, count: int, seed: int) -> torch.Tensor:
        """`[count, K]`: `count` neighbouring tokens of the file, from a random place on, or distinct random ids."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        if self.tokens is None:
            return torch.rand(count, self.num_experts, generator=generator).topk(self.top_k).indices
        start = int(torch.randint(len(self.tokens), (), generator=generator))
        return torch.tensor([self.tokens[(start + place) % len(self.tokens)] for place in range(count)])


class ZipfRouting(Routing):
    """Distinct experts of every token, the k-th most popular one drawn in proportion to k^-0.5.

    With 64 experts and 6 a token the busiest one serves 3.8 times the mean; in the routing that DeepSeek published
    with ESFT for V2-Lite it is 3.6 to 4.2 times.
    """

    def draw(self, count: int, seed: int) -> torch.Tensor:
        """`[count, K]`; another seed makes other experts popular."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(self.num_experts, generator=generator) + 1
        gumbel = -(-torch.rand(count, self.num_experts, generator=generator).log()).log()
        return (gumbel - ZIPF_EXPONENT * places.float().log()).topk(self.top_k).indices
