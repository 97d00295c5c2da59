"""Operations between PEFT's stacked factors of routed experts and one pair a projection and expert.

Stacked, A of `E` experts is `(E * r, in)`, expert after expert, and B is `(out, r * E)`, with the experts innermost.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..engine.operations import difference


@dataclass(frozen=True)
class Unstack:
    """Cuts a stacked factor into those of its experts and projections, expert after expert.

    Attributes:
        factor: "A" or "B".
        experts: how many there are; 1 for a factor that is not stacked.
        parts: projections in the stacked weight; they share A, and B's rows are theirs in turn.
        rank: that of the results; zeros fill lower ones up to it.
        scale: what B is multiplied by.
    """

    factor: str
    experts: int
    parts: int
    rank: int
    scale: float = 1.0

    def apply(self, source: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.factor == "A":
            return tuple(a for block in source.chunk(self.experts) for a in [self._padded(block)] * self.parts)
        matrices = (source * self.scale).view(len(source), -1, self.experts)
        return tuple(self._padded(b) for e in range(self.experts) for b in matrices[..., e].chunk(self.parts))

    def problem(self, sources, outputs) -> str | None:
        """Stacks the results again, and compares."""
        (source,) = sources
        rank = source.shape[0 if self.factor == "A" else 1] // self.experts
        by_part = [outputs[part :: self.parts] for part in range(self.parts)]
        if self.factor == "A":
            stacks = [torch.cat([a[:rank] for a in part]) for part in by_part]
            added = any(a[rank:].any() for a in outputs)
        else:
            scaled = source * self.scale
            stacks = [torch.stack([b[:, :rank] for b in part], -1).flatten(1) for part in by_part]
            stacks, source = [torch.cat(stacks)], scaled
            added = any(b[:, rank:].any() for b in outputs)
        different = next(filter(None, (difference(stack, source) for stack in stacks)), None)
        return different or ("has more than zeros beyond its rank" if added else None)

    def _padded(self, factor: torch.Tensor) -> torch.Tensor:
        missing = self.rank - factor.shape[0 if self.factor == "A" else 1]
        return F.pad(factor, (0, 0, 0, missing) if self.factor == "A" else (0, missing))


@dataclass(frozen=True)
class Stack:
    """Stacks the factors of all experts; the sources are those of one projection after the other.

    Attributes:
        factor: "A" or "B".
        parts: projections in the stacked weight.
        is_shared: whether they have one A, of which the sources are a single copy. If not, the ranks add up: A is
            `[A_gate; A_up]` and B `[[B_gate, 0], [0, B_up]]`, and B A has the same terms.
    """

    factor: str
    parts: int
    is_shared: bool

    def apply(self, *sources: torch.Tensor) -> tuple[torch.Tensor]:
        parts = [torch.stack(part) for part in self._by_part(sources)]
        if self.factor == "A":
            return (torch.cat(parts, dim=1).flatten(0, 1),)
        if self.is_shared:
            matrices = torch.cat(parts, dim=1)
        else:
            matrices = torch.stack([torch.block_diag(*blocks) for blocks in zip(*parts, strict=True)])
        return (matrices.permute(1, 2, 0).flatten(1),)

    def problem(self, sources, outputs) -> str | None:
        """Takes every expert's part out again, and compares."""
        by_part, (stacked,) = self._by_part(sources), outputs
        experts = len(by_part[0])
        for e in range(experts):
            block = stacked.chunk(experts)[e] if self.factor == "A" else stacked[:, e::experts]
            row = column = 0
            for part in by_part:
                rows, columns = part[e].shape
                found = block[row : row + rows, column : column + columns]
                if different := difference(found.contiguous(), part[e]):
                    return different
                row += rows
                column += 0 if self.is_shared or self.factor == "A" else columns
        filled = sum(int(source.count_nonzero()) for source in sources)
        return None if int(stacked.count_nonzero()) == filled else "is not zero between the projections"

    def _by_part(self, sources) -> list[tuple[torch.Tensor, ...]]:
        count = len(sources) // (1 if self.factor == "A" and self.is_shared else self.parts)
        return [sources[start : start + count] for start in range(0, len(sources), count)]
