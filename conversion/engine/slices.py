"""Operations on tensors that lie in slices, those of model-parallel ranks; each wraps that of the whole tensor."""

from dataclasses import dataclass

import torch

from .operations import Copy, Operation, difference


@dataclass(frozen=True)
class Sliced:
    """One of `count` equal slices of what `operation` makes, along `dim`."""

    operation: Operation
    dim: int
    index: int
    count: int

    def apply(self, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self._slice(whole) for whole in self.operation.apply(*sources))

    def problem(self, sources, outputs) -> str | None:
        whole = self.operation.apply(*sources)
        slices = zip(outputs, map(self._slice, whole), strict=True)
        return self.operation.problem(sources, whole) or next(
            filter(None, (difference(*pair) for pair in slices)), None
        )

    def _slice(self, whole: torch.Tensor) -> torch.Tensor:
        size = whole.shape[self.dim] // self.count
        return whole.narrow(self.dim, self.index * size, size).contiguous()


@dataclass(frozen=True)
class Pieces:
    """Where the slices of one tensor are.

    Attributes:
        names: the slices in order, or copies that must be the same.
        dim: along which they are joined; None for copies.
        files: the names' files.
    """

    names: tuple[str, ...]
    dim: int | None
    files: tuple[str, ...]

    def join(self, slices: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The whole tensor that these slices or copies are.

        Raises:
            ValueError: copies that differ; says between which files.
        """
        if self.dim is not None:
            parts = [part.view(torch.uint8) for part in slices]  # torch joins no float8
            return torch.cat(parts, self.dim).view(slices[0].dtype)
        for file, part in zip(self.files, slices, strict=True):
            if not torch.equal(part.view(torch.uint8), slices[0].view(torch.uint8)):
                raise ValueError(f"is not the same in {self.files[0]} and {file}")
        return slices[0]


@dataclass(frozen=True)
class Joined:
    """What `operation` makes of tensors that are joined from `pieces`."""

    operation: Operation
    pieces: tuple[Pieces, ...]

    def join(self, slices: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The sources of `operation`, from all slices one behind the other."""
        rest, whole = list(slices), []
        for pieces in self.pieces:
            count = len(pieces.names)
            whole.append(pieces.join(tuple(rest[:count])))
            del rest[:count]
        return tuple(whole)

    def apply(self, *slices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.operation.apply(*self.join(slices))

    def problem(self, sources, outputs) -> str | None:
        if not isinstance(self.operation, Copy):
            return self.operation.problem(self.join(sources), outputs)
        # Cut rather than joined, so that a check does not repeat a mistake of `join`.
        pieces = self.pieces[0]
        if pieces.dim is None:
            parts = [outputs[0]] * len(sources)
        else:
            parts = outputs[0].view(torch.uint8).chunk(len(sources), pieces.dim)
            parts = [part.contiguous().view(outputs[0].dtype) for part in parts]
        return next(filter(None, map(difference, parts, sources)), None)


def innermost(operation: Operation) -> Operation:
    """The operation of the whole tensor."""
    while isinstance(operation, Sliced | Joined):
        operation = operation.operation
    return operation
