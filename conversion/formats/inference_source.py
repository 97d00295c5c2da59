"""A folder of DeepSeek's model-parallel files as one checkpoint under published names, checked like any other."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_files import FP8_DTYPE, INDEX_NAME, SINGLE_NAME, TensorEntry, read_entries
from modeling_deepseek_moe.families import text_config_dict
from modeling_deepseek_moe.fp8_blocks import FP8_BLOCK, SCALE_SUFFIX
from modeling_deepseek_moe.parts import expert_of, layer_of

from ..engine.beside import CONFIG_NAME, MAX_LAYERS, check_links, other_files, read_config
from ..engine.slices import Pieces
from ..engine.source import TORCH_DTYPES, SourceCheckpoint, check_against_config, read_block
from .inference_config import check_agreement, config_json_of, read_model_args
from .inference_shards import (
    ARGS_NAME,
    MTP_NAME,
    published_name,
    rank_file,
    rank_key,
    rank_of_file,
    sliced_dim,
)

_GENERATION_NAME = "generation_config.json"
_SHARD_BYTES = 5 * 10**9


class Part(NamedTuple):
    """What one file has of a tensor."""

    file: str
    key: str
    entry: TensorEntry


@dataclass(frozen=True)
class RankFiles(SourceCheckpoint):
    """The files as they are; `entries` and `file_of` have `rank_key` names."""

    def key(self, file: str, name: str) -> str:
        return rank_key(file, name)


@dataclass(frozen=True)
class JoinedCheckpoint(SourceCheckpoint):
    """What the files are together: published names, whole shapes, in files that could be written.

    Attributes:
        ranks: the files themselves.
        pieces: what each tensor is joined from.
        notes: what to tell the user about the config.
    """

    ranks: RankFiles
    pieces: dict[str, Pieces]
    notes: tuple[str, ...]


def holds_ranks(folder: str | os.PathLike) -> bool:
    """Whether a folder has files of ranks, and no checkpoint that could be meant instead."""
    folder = Path(folder)
    if not folder.is_dir() or (folder / SINGLE_NAME).is_file() or (folder / INDEX_NAME).is_file():
        return False
    return any(map(rank_of_file, os.listdir(folder)))


def open_ranks(folder: str | os.PathLike, with_published_config: bool = True) -> JoinedCheckpoint:
    """Reads ModelArgs and headers of a folder of ranks, and checks that together they are one whole, sound checkpoint.

    Args:
        folder: the folder of the ranks' files.
        with_published_config: whether to take the `config.json` that may lie beside them, or the ModelArgs alone.

    Raises:
        CheckpointError: one line that names file and tensor; nothing is converted from such a folder.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    folder = Path(folder).resolve()
    files = _rank_files(folder)
    args_path = _args_path(folder)
    args = read_model_args(read_config(folder, args_path.name), args_path)
    file_of, entries, parts = _read_files(folder, files, args["n_layers"])
    pieces = {name: _pieces(folder, name, found, files, args) for name, found in parts.items()}
    whole = {name: _whole_entry(parts[name][0][2], pieces[name]) for name in parts}
    with_published_config &= args_path.name == ARGS_NAME and (folder / CONFIG_NAME).is_file()
    if with_published_config:
        config_json, notes = _published_config(folder), []
    else:
        config_json, notes = _config_of_args(folder, args, whole)
    try:
        config = DeepseekMoeConfig.from_dict(dict(config_json))
    except Exception as error:  # a field of the wrong type can fail anywhere in the configuration classes
        path = folder / CONFIG_NAME if with_published_config else args_path
        raise CheckpointError(f"{path}: {error}") from error
    config_json = text_config_dict(config_json)  # ranks hold no other part
    if with_published_config:
        check_agreement(args, config, args_path, CONFIG_NAME)
    check_against_config(folder, config, {name: pieces[name].files[0] for name in pieces}, whole, FP8_BLOCK)
    _check_precision(args_path, args, whole)
    others = [name for name in other_files(folder) if name != ARGS_NAME]
    ranks = RankFiles(folder, config_json, file_of, entries, config, FP8_BLOCK, others)
    whole = {name: whole[name] for name in sorted(whole, key=_layer_order)}
    joined = JoinedCheckpoint(
        folder, config_json, _written_files(whole), whole, config, FP8_BLOCK, others, ranks, pieces, tuple(notes)
    )
    if joined.lost_mtp_layers:
        lost = f"no {MTP_NAME}: the MTP modules that {CONFIG_NAME} announces are left out"
        return dataclasses.replace(joined, notes=(*notes, lost))
    return joined


def _args_path(folder: Path) -> Path:
    """The file of ModelArgs: its own, or `config.json` where someone gave them that name."""
    if not (folder / ARGS_NAME).is_file() and not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{folder} has no {ARGS_NAME}; the file that DeepSeek's generate.py takes as --config belongs there"
        )
    return folder / (ARGS_NAME if (folder / ARGS_NAME).is_file() else CONFIG_NAME)


def _rank_files(folder: Path) -> list[str]:
    found = {file: rank for file in os.listdir(folder) if (rank := rank_of_file(file))}
    counts = sorted({mp for _, mp in found.values()})
    if not counts:
        raise CheckpointError(f"{folder} has no {rank_file(0, 1)} or other file of a rank")
    if len(counts) > 1:
        raise CheckpointError(f"{folder} has files for mp={counts[0]} and for mp={counts[1]}; keep those of one")
    mp = counts[0]
    missing = next((rank for rank in range(mp) if rank_file(rank, mp) not in found), None)
    if missing is not None:
        raise CheckpointError(f"{folder} lacks {rank_file(missing, mp)}")
    stray = next((file for file, (rank, _) in found.items() if rank >= mp), None)
    if stray:
        raise CheckpointError(f"{folder / stray} is the file of a rank beyond mp={mp}")
    return [rank_file(rank, mp) for rank in range(mp)]


def _read_files(folder: Path, files: list[str], layers: int) -> tuple[dict, dict, dict[str, list[Part]]]:
    """`file_of` and `entries` by `rank_key`, and the parts of every tensor by published name."""
    file_of, entries, parts = {}, {}, {}
    mtp = [MTP_NAME] if (folder / MTP_NAME).is_file() else []
    check_links(folder, [*files, *mtp])
    for file in [*files, *mtp]:
        for name, entry in read_entries(folder / file).items():
            if file == MTP_NAME:
                published = name if (layer_of(name) or 0) >= layers else None
            else:
                published = published_name(name)
            if published is None:
                known = "an MTP module" if file == MTP_NAME else "DeepSeek's inference program"
                raise CheckpointError(f"{folder / file}: tensor {name} is not one of {known}")
            key = rank_key(file, name)
            file_of[key], entries[key] = file, entry
            found = parts.setdefault(published, [])
            if found and file == MTP_NAME:
                raise CheckpointError(f"{folder / file}: tensor {name} is in {found[0][0]} as well")
            found.append(Part(file, key, entry))
    return file_of, entries, parts


def _pieces(folder: Path, name: str, found: list[Part], files: list[str], args: dict[str, Any]) -> Pieces:
    """Where the parts of a tensor are, after a check that every rank has what it should."""
    in_files, keys, entries = zip(*found, strict=True)
    if in_files == (MTP_NAME,):
        return Pieces(keys, None, in_files)
    mp, expert = len(files), expert_of(name)

    def here() -> str:
        return f"{folder / in_files[0]}: tensor {keys[0].partition(':')[2]}"

    if expert is not None:
        experts = args["n_routed_experts"]
        if experts % mp:
            raise CheckpointError(f"{folder}: n_routed_experts={experts} cannot be divided among mp={mp} ranks")
        right = files[min(expert * mp // max(experts, 1), mp - 1)]
        wrong = next((file for file in in_files if file != right), None)
        if wrong:
            raise CheckpointError(f"{here()} of n_routed_experts={experts} belongs to {right} only, but is in {wrong}")
        return Pieces(keys, None, in_files)
    absent = next((file for file in files if file not in in_files), None)
    if absent:
        raise CheckpointError(f"{folder / absent} lacks tensor {keys[0].partition(':')[2]}, which {in_files[0]} has")
    for file, entry in zip(in_files, entries, strict=True):
        if entry[:2] != entries[0][:2]:
            one, other = (f"{each.dtype} {list(each.shape)}" for each in (entries[0], entry))
            raise CheckpointError(f"{here()} is {one}, but {other} in {file}")
    dim = sliced_dim(name)
    if dim is not None and len(entries[0].shape) != 2:
        raise CheckpointError(f"{here()} is {list(entries[0].shape)}, which is no matrix")
    if dim is not None and mp > 1 and entries[0].dtype == FP8_DTYPE and entries[0].shape[dim] % FP8_BLOCK[dim]:
        raise CheckpointError(
            f"{here()} {list(entries[0].shape)} ends within an FP8 block of {FP8_BLOCK[dim]}; its scales cannot be "
            "joined"
        )
    return Pieces(keys, dim, in_files)


def _whole_entry(entry: TensorEntry, pieces: Pieces) -> TensorEntry:
    """The tensor joined from pieces like `entry`, as if it began where its file does."""
    shape, size = list(entry.shape), entry.stop - entry.start
    if pieces.dim is not None:
        shape[pieces.dim] *= len(pieces.names)
        size *= len(pieces.names)
    return TensorEntry(entry.dtype, tuple(shape), 0, size)


def _published_config(folder: Path) -> dict[str, Any]:
    config_json = read_config(folder)
    if read_block(folder / CONFIG_NAME, config_json) != FP8_BLOCK:
        raise CheckpointError(f"{folder / CONFIG_NAME}: weight_block_size is not {list(FP8_BLOCK)}")
    return config_json


def _config_of_args(folder: Path, args: dict[str, Any], whole: dict[str, TensorEntry]) -> tuple[dict, list[str]]:
    """A `config.json` made of the ModelArgs, and what had to be added to them."""
    norm = whole.get("model.norm.weight")
    dtype = str(TORCH_DTYPES.get(norm.dtype if norm else "BF16", "torch.bfloat16")).removeprefix("torch.")
    mtp_layers = {layer_of(name) for name in whole if name.endswith(".enorm.weight")}
    has_bias = any(name.endswith(".e_score_correction_bias") for name in whole)
    ids = _special_ids(folder)
    config_json = config_json_of(args, has_bias=has_bias, mtp_layers=len(mtp_layers), dtype=dtype, ids=ids)
    if any(entry.dtype == FP8_DTYPE for entry in whole.values()):
        config_json["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(FP8_BLOCK),
            **({"scale_fmt": args["scale_fmt"]} if args["scale_fmt"] else {}),
        }
    origin = _GENERATION_NAME if len(ids) == 2 else f"what {config_json['model_type']} models have"
    tokens = ", ".join(f"{name}={config_json[name]}" for name in ("bos_token_id", "eos_token_id"))
    return config_json, [f"the config is made of the ModelArgs alone, with {tokens} of {origin}"]


def _special_ids(folder: Path) -> dict[str, Any]:
    if not (folder / _GENERATION_NAME).is_file():
        return {}
    generation = read_config(folder, _GENERATION_NAME)
    return {name: generation[name] for name in ("bos_token_id", "eos_token_id") if generation.get(name) is not None}


def _check_precision(path: Path, args: dict[str, Any], whole: dict[str, TensorEntry]) -> None:
    main = (name for name in whole if (layer_of(name) or 0) < args["n_layers"])
    fp8 = next((name for name in main if whole[name].dtype == FP8_DTYPE), None)
    if (fp8 is not None) != (args["dtype"] == "fp8"):
        found = f"tensor {fp8} is FP8" if fp8 else "no tensor is FP8"
        raise CheckpointError(f"{path}: dtype={args['dtype']!r}, but {found}; correct it")


def _layer_order(name: str) -> tuple:
    """Embedding, layers, norm and head; a weight right before its scales."""
    layer, expert = layer_of(name), expert_of(name)
    if layer is None:
        layer = -1 if name.startswith("model.embed_tokens.") else MAX_LAYERS
    return layer, -1 if expert is None else expert, name


def _written_files(whole: dict[str, TensorEntry]) -> dict[str, str]:
    """The file that each tensor goes to: in layer order, of 5 GB or one tensor."""
    number, size, numbers = 0, 0, {}
    for name, entry in whole.items():
        own = entry.stop - entry.start
        if size and size + own > _SHARD_BYTES and not name.endswith(SCALE_SUFFIX):
            number, size = number + 1, 0
        numbers[name] = number
        size += own
    if not number:
        return dict.fromkeys(whole, SINGLE_NAME)
    return {name: f"model-{n + 1:05}-of-{number + 1:05}.safetensors" for name, n in numbers.items()}
