"""An adapter merged into a checkpoint while it is converted, tensor by tensor: `W + scaling * B A`.

The arithmetic is that of PEFT's `merge_and_unload` with an adapter in float32, which is how PEFT loads it: the product
in float32, then the sum rounded to the weight's type; before that, for parameters that are not a linear layer's, the
product too. FP8 weights are dequantized first.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.checkpoint_layout import MTP_COPIES
from modeling_deepseek_moe.fp8_blocks import SCALE_SUFFIX, scale_shape
from modeling_deepseek_moe.parts import part_of

from ..engine.operations import Cast, Copy, Dequantize, Operation, Quantize
from ..engine.plan import Step, TensorSpec
from ..engine.source import SourceCheckpoint
from ..engine.writing import Reader
from .esft import ESFT_CONFIG, EsftAdapter, open_esft, replaced_by
from .files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoraAdapter, Pair, open_adapter
from .overlay import overlaid, untied

# Both factors of both stacked weights of a layer, however its experts are mixed in a file.
_FACTORS_IN_MEMORY = 4
EMBEDDING, HEAD = MTP_COPIES.values()


class Factors:
    """The factors of an adapter, read when a weight needs them."""

    def __init__(self, adapter: LoraAdapter):
        self._adapter = adapter
        self.read = functools.lru_cache(_FACTORS_IN_MEMORY)(self._read)

    def _read(self, key: str) -> torch.Tensor:
        with Reader(self._adapter) as reader:
            return reader.read(key).float()


@dataclass(frozen=True)
class Delta:
    """What is added to one weight.

    Attributes:
        factors: the adapter's, read when they are needed.
        pair: keys of A and B.
        rounds_product: whether PEFT rounds the product to the weight's type before it adds it.
        expert: number of the expert whose part of stacked factors it is.
        rows: first and last but one row of B that belong to the weight; None for all.
    """

    factors: Factors
    pair: Pair
    rounds_product: bool
    expert: int = 0
    rows: tuple[int, int] | None = None

    def product(self) -> torch.Tensor:
        """B A in float32, as the weight lies."""
        b, a = self.matrices()
        # As PEFT multiplies: the transposed product has the same terms, but other roundings.
        return (a.t() @ b.t()).t() if self.pair.is_embedding else b @ a

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The left factor `(rows, r)` and the right one `(r, columns)` in float32; of a linear layer B and A."""
        a, b = self.factors.read(self.pair.a), self.factors.read(self.pair.b)
        if self.pair.is_embedding:
            return a.t(), b.t()
        b = b[slice(*self.rows)] if self.rows else b
        experts = self.pair.experts or 1
        return b.view(len(b), -1, experts)[..., self.expert].contiguous(), a.chunk(experts)[self.expert]


@dataclass(frozen=True)
class Merge:
    """A weight plus the product of two factors; `before` makes the weight, `after` the outputs of the sum."""

    before: Operation
    delta: Delta
    after: Operation

    def apply(self, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.after.apply(self._merged(*self.before.apply(*sources)))

    def problem(self, sources, outputs) -> str | None:
        """Holds the sum to a float64 one by what rounding it costs, then the outputs to the sum."""
        (weight,) = self.before.apply(*sources)
        merged = self._merged(weight).double()
        b, a = (factor.double() for factor in self.delta.matrices())
        scaling = self.delta.pair.scaling
        product, terms = scaling * (b @ a), abs(scaling) * (b.abs() @ a.abs())
        limits = torch.finfo(weight.dtype)
        bound = limits.eps * (weight.double().abs() + 2 * product.abs()) + limits.tiny
        bound += (a.shape[0] + 2) * torch.finfo(torch.float32).eps * terms
        beyond = ~((merged - (weight.double() + product)).abs() <= bound)
        if beyond.any():
            return f"{int(beyond.sum())} values are further off W + B A than rounding"
        return self.after.problem((merged.to(weight.dtype),), outputs)

    def _merged(self, weight: torch.Tensor) -> torch.Tensor:
        product = self.delta.product() * self.delta.pair.scaling
        if self.delta.rounds_product:
            product = product.to(weight.dtype)
        merged = (weight + product).to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError("holds values that are not finite when the adapter is merged")
        return merged


@dataclass(frozen=True)
class AppliedAdapter:
    """A checkpoint with what an adapter does to it.

    Attributes:
        source: the checkpoint, with the tensors that the adapter replaces.
        adapter: what is applied; None if nothing is.
        deltas: what is added to weights, by their names.
        only: modules whose LoRA is merged; empty for all.
        dtypes: types that replaced tensors get before anything else: those of what they replace, as PEFT loads them.
    """

    source: SourceCheckpoint
    adapter: LoraAdapter | EsftAdapter | None = None
    deltas: dict[str, Delta] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    @property
    def without_logits(self) -> str:
        """Why no tokens can be run through source and result to compare them."""
        return "an adapter was merged, so the source computes something else" if self.adapter else ""

    def step(self, name: str, step_of: Callable[[str], Step | None], dtype: torch.dtype | None = None) -> Step | None:
        """The step of tensor `name` with its `Delta` in it.

        Args:
            name: of the tensor.
            step_of: gives the step without.
            dtype: that all weights are to get; None if each keeps its own.
        """
        if name in self.dtypes and isinstance((step := step_of(name)).operation, Copy | Cast):
            wanted = dtype or self.dtypes[name]
            operation = Copy() if wanted == self.source.dtype(name) else Cast(wanted)
            if name in self.deltas:
                operation = Merge(operation, self.deltas[name], Copy())
            return Step(operation, step.sources, (dataclasses.replace(step.outputs[0], dtype=wanted),))
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight not in self.deltas or (name != weight and not self.source.is_fp8(weight)):
            return step_of(name)
        if name != weight:
            return None  # made with its weight, or not at all
        delta, step = self.deltas[weight], step_of(name)
        if isinstance(step.operation, Dequantize):
            return dataclasses.replace(step, operation=Merge(step.operation, delta, Copy()))
        if not self.source.is_fp8(name):
            return dataclasses.replace(step, operation=Merge(Copy(), delta, step.operation))
        block, (spec,) = self.source.block, step.outputs
        scale_fmt = (self.source.text_json.get("quantization_config") or {}).get("scale_fmt")
        if self.source.dtype(name + SCALE_SUFFIX) != torch.float32 or scale_fmt == "ue8m0":
            raise CheckpointError(
                f"{self.source.folder}: {name} has ue8m0 scales, and quantizing after a merge makes float32 ones; "
                "give --to bf16"
            )
        scale = TensorSpec(name + SCALE_SUFFIX, torch.float32, scale_shape(spec.shape, block))
        operation = Merge(Dequantize(torch.bfloat16, block), delta, Quantize(block))
        return Step(operation, (name, name + SCALE_SUFFIX), (spec, scale))


def apply_adapter(source: SourceCheckpoint, folder: str | os.PathLike, only: tuple[str, ...] = ()) -> AppliedAdapter:
    """What an adapter folder does to a checkpoint: a LoRA adapter of PEFT, stacked or per expert, or an ESFT adapter.

    Args:
        source: the base.
        folder: adapter folder, with `adapter_config.json` or `expert_cfg.json`.
        only: names that the merged modules end with, such as "kv_b_proj"; by default every tensor of the adapter must
            find its weight.

    Raises:
        CheckpointError: the adapter is broken, or does not fit the checkpoint; names file and tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if (folder / ESFT_CONFIG).is_file():
        esft = open_esft(folder)
        if only:
            raise CheckpointError(
                f"{folder} is an ESFT adapter, which is merged as a whole, not only {', '.join(only)}"
            )
        return AppliedAdapter(overlaid(source, esft, replaced_by(esft, source)), esft)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder} has neither {ADAPTER_CONFIG} nor {ESFT_CONFIG}")
    adapter = open_adapter(folder)
    pairs = {name: pair for name, pair in adapter.pairs.items() if _is_chosen(name, only)}
    saved = {name: key for name, key in adapter.saved.items() if _is_chosen(name.rpartition(".")[0], only)}
    if not pairs and not saved:
        modules = sorted({name.rpartition(".")[2] for name in adapter.pairs})
        raise CheckpointError(f"{folder}: --only {','.join(only)} names nothing of it; it has {', '.join(modules)}")
    if source.config.tie_word_embeddings:
        source, pairs, saved = _settle_ties(source, adapter, pairs, saved)
    replaced = {weight: key for name, key in saved.items() for weight in _with_copies(source, _published(name))}
    deltas = _deltas(source, adapter, pairs)
    dtypes = {
        name: source.dtype(name)
        for name in replaced
        if name in source.entries and not source.is_fp8(name) and not name.endswith("e_score_correction_bias")
    }
    return AppliedAdapter(overlaid(source, adapter, replaced), adapter, deltas, only, dtypes)


def _settle_ties(
    source: SourceCheckpoint, adapter: LoraAdapter, pairs: dict[str, Pair], saved: dict[str, str]
) -> tuple[SourceCheckpoint, dict[str, Pair], dict[str, str]]:
    """What an adapter does to a checkpoint whose embedding is its head too; where it does two things, they part."""
    ours = {_published(name): name for name in (*pairs, *saved)}
    embedding, head = (ours.get(name.removesuffix(".weight")) for name in (EMBEDDING, HEAD))
    if embedding and head and _is_one(adapter, pairs[embedding], pairs[head]):
        pairs = {name: pair for name, pair in pairs.items() if name != head}
        embedding = head = None
    whole = {name: ours[name] for name in (EMBEDDING, HEAD) if name in ours}
    copies = [name for name, own in whole.items() if own not in adapter.in_place]
    kept = {name: key for name, key in saved.items() if name not in whole.values()}
    own = next((saved[name] for name in whole.values() if name in adapter.in_place), None)
    weights = [EMBEDDING]
    if embedding or head or copies:
        source, weights = untied(source), [EMBEDDING, HEAD]
    kept |= {name: saved[whole[name]] if name in copies else own for name in weights if name in copies or own}
    return source, pairs, kept


def _is_one(adapter: LoraAdapter, embedding: Pair, head: Pair) -> bool:
    """Whether both get the same product, as PEFT has it with `ensure_weight_tying`."""
    read = Factors(adapter).read
    same = torch.equal(read(embedding.a).t(), read(head.b)) and torch.equal(read(embedding.b).t(), read(head.a))
    return same and embedding.scaling == head.scaling


def _is_chosen(name: str, only: tuple[str, ...]) -> bool:
    return not only or any(f".{name}".endswith(f".{module}") for module in only)


def _published(name: str) -> str:
    """A name of the model's, as checkpoints have it; adapters of a model without a head leave out `model.`."""
    return name if name.startswith(("model.", "lm_head.")) or name == "lm_head" else f"model.{name}"


def _with_copies(source: SourceCheckpoint, name: str) -> list[str]:
    """A tensor and what MTP modules repeat of it, since they share embedding and head with the model."""
    first, count = source.config.num_hidden_layers, source.config.num_nextn_predict_layers
    names = {name, HEAD} if name == EMBEDDING and source.config.tie_word_embeddings else {name}
    copies = [copy for copy, original in MTP_COPIES.items() if original in names]
    repeated = [f"model.layers.{layer}.{copy}" for layer in range(first, first + count) for copy in copies]
    return [name, *(copy for copy in repeated if copy in source.entries)]


def _deltas(source: SourceCheckpoint, adapter: LoraAdapter, pairs: dict[str, Pair]) -> dict[str, Delta]:
    factors, deltas = Factors(adapter), {}
    for name, pair in pairs.items():
        # PEFT rounds the product by itself in its layers of bare parameters and of embeddings.
        rounds = pair.is_embedding or name in adapter.parameters or part_of(name) == "routed_experts"
        whole = Delta(factors, pair, rounds)
        if pair.experts:
            parts = _expert_parts(source, adapter, name, whole)
        else:
            parts = dict.fromkeys(_with_copies(source, f"{_published(name)}.weight"), whole)
        for weight, delta in parts.items():
            entry = source.entries.get(weight)
            columns = adapter.entries[pair.a].shape[1]
            first, end = delta.rows or (0, adapter.entries[pair.b].shape[0])
            made = (end - first, columns)[:: -1 if pair.is_embedding else 1]
            path = adapter.folder / ADAPTER_WEIGHTS
            if entry is None:
                raise CheckpointError(
                    f"{path}: tensor {pair.a} belongs to {weight}, which {source.folder} does not have"
                )
            if entry.shape != made:
                raise CheckpointError(
                    f"{path}: tensors {pair.a} and {pair.b} make {list(made)}, but {weight} is {list(entry.shape)}"
                )
            if weight in deltas:
                raise CheckpointError(f"{path}: {weight} has more than one pair of factors")
            deltas[weight] = delta
    return deltas


def _expert_parts(source: SourceCheckpoint, adapter: LoraAdapter, name: str, whole: Delta) -> dict[str, Delta]:
    """The share of every expert and projection in the delta of a stacked weight."""
    experts, stacked = _published(name).rsplit(".", 1)
    count, rows = whole.pair.experts, adapter.entries[whole.pair.b].shape[0]
    if count != source.config.n_routed_experts:
        raise CheckpointError(
            f"{adapter.folder / ADAPTER_WEIGHTS}: tensor {whole.pair.a} is that of {count} experts of rank "
            f"{whole.pair.rank}, but {source.folder} has n_routed_experts={source.config.n_routed_experts}"
        )
    is_gate_up = stacked == "gate_up_proj"
    halves = {"gate": (0, rows // 2), "up": (rows // 2, rows)} if is_gate_up else {"down": (0, rows)}
    return {
        f"{experts}.{e}.{part}_proj.weight": dataclasses.replace(whole, expert=e, rows=half)
        for e in range(count)
        for part, half in halves.items()
    }
