"""The plans of `deepseek-inference`: a checkpoint cut into files of model-parallel ranks, and such files joined."""

import dataclasses

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_files import TensorEntry
from modeling_deepseek_moe.checkpoint_layout import is_fp8_weight, is_mtp_tensor, is_redundant
from modeling_deepseek_moe.fp8_blocks import FP8_BLOCK, SCALE_SUFFIX
from modeling_deepseek_moe.parts import expert_of

from ..engine.operations import Copy
from ..engine.plan import Plan, Shard, Step, TensorSpec
from ..engine.slices import Joined, Sliced
from .inference_config import BIASED_WIDTH, INFERENCE, model_args
from .inference_shards import ARGS_NAME, MTP_NAME, inference_name, rank_file, sliced_dim
from .inference_source import JoinedCheckpoint, open_ranks

_WORDS = ("rows", "columns")


def cut(plan: Plan, mp: int) -> Plan:
    """The plan of the same tensors in the files of `mp` ranks.

    Args:
        plan: one that writes the tensors under their published names; its config is kept beside the ModelArgs.
        mp: how many ranks.

    Raises:
        CheckpointError: the program cannot run the model, or not on so many ranks; names the field or the tensor.
    """
    config, source = plan.source.config, plan.source
    steps = [step for shard in plan.shards for step in shard.steps]
    is_fp8 = _is_fp8(plan, steps)
    scale_fmt = (plan.config_json.get("quantization_config") or {}).get("scale_fmt")
    args = model_args(config, "fp8" if is_fp8 else "bf16", scale_fmt)
    if is_fp8 and source.block != FP8_BLOCK:
        raise CheckpointError(
            f"weight_block_size={list(source.block)} cannot be expressed as {INFERENCE}: it is always "
            f"{list(FP8_BLOCK)} there"
        )
    for field in ("num_attention_heads", "n_routed_experts"):
        if getattr(config, field) % mp:
            raise CheckpointError(f"{field}={getattr(config, field)} cannot be divided among mp={mp} ranks")
    of_rank: list[list[Step]] = [[] for _ in range(mp)]
    mtp, left_out, slices = [], [], {}
    for step in steps:
        name = step.outputs[0].name
        if is_redundant(name) and not is_mtp_tensor(name, config):
            left_out.append(name)
        elif is_mtp_tensor(name, config):
            mtp.append(step)
        elif (expert := expert_of(name)) is not None:
            of_rank[expert * mp // config.n_routed_experts].append(_renamed(step))
        else:
            for rank, part in enumerate(_slices_of(plan, step, mp, slices)):
                of_rank[rank].append(part)
    shards = [Shard(rank_file(rank, mp), tuple(steps)) for rank, steps in enumerate(of_rank)]
    if mtp:
        shards.append(Shard(MTP_NAME, tuple(mtp)))
    if slices:
        source = dataclasses.replace(
            source,
            entries=source.entries | slices,
            file_of=source.file_of | {key: source.file_of[key.partition("[")[0]] for key in slices},
        )
    return dataclasses.replace(
        plan,
        source=source,
        shards=tuple(shards),
        json_files={ARGS_NAME: args},
        other_files=tuple(name for name in plan.other_files if name != ARGS_NAME),
        with_index=False,
        read_back=lambda folder: open_ranks(folder).ranks,
        notes=(*plan.notes, *_notes(config, args, mtp, left_out)),
    )


def joined(plan: Plan) -> Plan:
    """A plan whose source is a `JoinedCheckpoint`, as one that reads the ranks' files themselves."""
    ranks, pieces = plan.source.ranks, plan.source.pieces

    def of_ranks(step: Step) -> Step:
        parts = tuple(pieces[name] for name in step.sources)
        names = tuple(name for part in parts for name in part.names)
        operation = step.operation if len(names) == len(parts) else Joined(step.operation, parts)
        return Step(operation, names, step.outputs)

    shards = (Shard(shard.file, tuple(map(of_ranks, shard.steps))) for shard in plan.shards)
    return dataclasses.replace(plan, source=ranks, shards=tuple(shards), notes=(*plan.source.notes, *plan.notes))


def _is_fp8(plan: Plan, steps: list[Step]) -> bool:
    """The program's linear layers are all FP8 or all plain; which ones those are is `is_fp8_weight`'s to say."""
    config = plan.source.config
    names = {spec.name for step in steps for spec in step.outputs if not is_mtp_tensor(spec.name, config)}
    in_fp8 = {name.removesuffix(SCALE_SUFFIX) for name in names if name.endswith(SCALE_SUFFIX)}
    other = next((name for name in sorted(names) if (name in in_fp8) != (bool(in_fp8) and is_fp8_weight(name))), None)
    if other:
        is_not = "is FP8" if other in in_fp8 else "is not FP8, as others are"
        raise CheckpointError(
            f"{plan.source.folder}: tensor {other} {is_not}, which cannot be expressed as {INFERENCE}; give --dtype "
            "bfloat16"
        )
    return bool(in_fp8)


def _renamed(step: Step) -> Step:
    (spec,) = step.outputs
    return Step(step.operation, step.sources, (dataclasses.replace(spec, name=inference_name(spec.name)),))


def _slices_of(plan: Plan, step: Step, mp: int, slices: dict[str, TensorEntry]) -> list[Step]:
    """A step for every rank; those that only copy bytes get their slice of the source as an entry of its own."""
    spec, source = step.outputs[0], plan.source
    dim = sliced_dim(spec.name)
    if dim is None or mp == 1:
        return [_renamed(step)] * mp
    size, block = spec.shape[dim], source.block[dim]
    if size % mp:
        what = f"FP8 blocks of {block} {_WORDS[dim]}" if spec.name.endswith(SCALE_SUFFIX) else _WORDS[dim]
        raise CheckpointError(f"tensor {spec.name}: {size} {what} cannot be divided among mp={mp} ranks")
    if _is_fp8_spec(spec) and size // mp % block:
        raise CheckpointError(
            f"tensor {spec.name}: {size} {_WORDS[dim]} among mp={mp} ranks would cut FP8 blocks of {block}; give "
            "fewer ranks, or --dtype bfloat16"
        )
    shape = tuple(size // mp if i == dim else length for i, length in enumerate(spec.shape))
    outputs = (TensorSpec(inference_name(spec.name), spec.dtype, shape),)
    if not isinstance(step.operation, Copy) or dim or isinstance(source, JoinedCheckpoint):
        return [Step(Sliced(step.operation, dim, rank, mp), step.sources, outputs) for rank in range(mp)]
    name, steps = step.sources[0], []
    whole, length = source.entries[name], outputs[0].size
    for rank in range(mp):
        key, start = f"{name}[{rank}/{mp}]", whole.start + rank * length
        slices[key] = TensorEntry(whole.dtype, shape, start, start + length)
        steps.append(Step(Copy(), (key,), outputs))
    return steps


def _is_fp8_spec(spec: TensorSpec) -> bool:
    return spec.dtype.itemsize == 1 and not spec.name.endswith(SCALE_SUFFIX)


def _notes(config: DeepseekMoeConfig, args: dict, mtp: list[Step], left_out: list[str]) -> list[str]:
    notes = []
    if mtp:
        notes.append(
            f"DeepSeek's inference program has no multi-token prediction: the {len(mtp)} tensors of the MTP modules "
            f"are in {MTP_NAME}, which it does not open"
        )
    if left_out:
        notes.append(f"left out: {len(left_out)} rotary tables such as {left_out[0]}, which the program computes")
    if config.topk_method == "noaux_tc" and config.hidden_size != BIASED_WIDTH:
        notes.append(
            f"DeepSeek's inference program gives its Gate a bias where dim is {BIASED_WIDTH}, and here it is "
            f"{config.hidden_size}: change that condition in model.py, or it refuses to load gate.bias"
        )
    if args["max_seq_len"] < config.max_position_embeddings:
        notes.append(
            f"max_seq_len={args['max_seq_len']} in {ARGS_NAME}: the program reserves its cache for so many "
            f"positions; the model was made for {config.max_position_embeddings}"
        )
    return notes
