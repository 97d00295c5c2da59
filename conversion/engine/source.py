"""A checkpoint to convert: its config, where every tensor lies, and all checks that need no tensor's values."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_files import (
    FP8_DTYPE,
    INDEX_NAME,
    SINGLE_NAME,
    TensorEntry,
    check_fp8_scales,
    check_tensors,
    read_entries,
    read_index,
)
from modeling_deepseek_moe.checkpoint_layout import expected_tensors, is_mtp_tensor, is_redundant
from modeling_deepseek_moe.families import TEXT_PREFIX, Wrapper, text_config_dict, wrapper_of
from modeling_deepseek_moe.fp8_blocks import FP8_BLOCK, SCALE_SUFFIX

from .beside import CONFIG_NAME, LAYER_FIELDS, PICKLE_SUFFIXES, check_links, other_files, read_config

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    FP8_DTYPE: torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_READ_DTYPES = ("F32", "F16", "BF16", FP8_DTYPE)


@dataclass(frozen=True)
class TensorFolder:
    """A folder whose safetensors files are checked, and can be read tensor by tensor.

    Attributes:
        folder: its path, with links resolved.
        config_json: its configuration as it is written.
        file_of: the file of every tensor, in `folder` unless it is an absolute path.
        entries: dtype, shape and place of every tensor.
    """

    folder: Path
    config_json: dict[str, Any]
    file_of: dict[str, str]
    entries: dict[str, TensorEntry]

    @cached_property
    def names_of_file(self) -> dict[str, list[str]]:
        """The tensors of every file, files in the order of their names."""
        names: dict[str, list[str]] = {file: [] for file in sorted(set(self.file_of.values()))}
        for name, file in self.file_of.items():
            names[file].append(name)
        return names

    def key(self, file: str, name: str) -> str:
        """What tensor `name` of `file` is called in `entries`."""
        return name

    def is_fp8(self, name: str) -> bool:
        """Whether a tensor is FP8 values, which have scales beside them."""
        return self.entries[name].dtype == FP8_DTYPE

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's type."""
        return TORCH_DTYPES[self.entries[name].dtype]

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        return self.entries[name].stop - self.entries[name].start

    def is_whole(self, file: str) -> bool:
        """Whether `file` holds the tensors of `names_of_file` and nothing else."""
        return True

    def fingerprint(self) -> str:
        """Changes whenever a file of the folder is replaced or written to."""
        digest = hashlib.sha256(json.dumps(self.config_json, sort_keys=True).encode())
        for file in self.names_of_file:
            state = (self.folder / file).stat()
            digest.update(f"{file} {state.st_size} {state.st_mtime_ns}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class SourceCheckpoint(TensorFolder):
    """A sound checkpoint folder of the family.

    Of a model of several parts (`Wrapper`) `entries` has the text part's tensors under the names that they have where
    it is a model of its own, and those of the other parts under their own.

    Attributes:
        config: what `config_json` means; `num_nextn_predict_layers` is 0 if the tensors of the MTP modules are not
            there.
        block: rows and columns of FP8 blocks.
        other_files: names of what lies beside the weights: tokenizer, licence and so on.
    """

    config: DeepseekMoeConfig
    block: tuple[int, int]
    other_files: list[str]

    @property
    def wrapper(self) -> Wrapper | None:
        """What the text model is a part of; None if it is all there is."""
        return wrapper_of(self.config_json)

    @property
    def text_json(self) -> dict[str, Any]:
        """What `config_json` says of the text part."""
        return text_config_dict(self.config_json)

    @property
    def text_names(self) -> list[str]:
        """The names in `entries` of the text part's tensors."""
        return [name for name in self.entries if not self.is_other_part(name)]

    @property
    def lost_mtp_layers(self) -> bool:
        """Whether `config.json` announces MTP modules that are not there."""
        return self.config.num_nextn_predict_layers == 0 and any(self.text_json.get(f) for f in LAYER_FIELDS[1:])

    def is_other_part(self, name: str) -> bool:
        """Whether a tensor is of another part of the model than the text part, which is left as it is."""
        return self.wrapper is not None and name.startswith(self.wrapper.other_parts)

    def key(self, file: str, name: str) -> str:
        return name.removeprefix(TEXT_PREFIX) if self.wrapper else name


def open_source(folder: str | os.PathLike) -> SourceCheckpoint:
    """Reads config, index and headers of a checkpoint folder, and checks that they are one whole, sound checkpoint.

    Raises:
        CheckpointError: one line that names file and tensor; nothing is converted from such a folder.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is not a folder; download a model first: hf download NAME --local-dir FOLDER")
    folder = Path(folder).resolve()
    config_json, config = read_model_config(folder)
    files = weight_files(folder)
    check_links(folder, files)
    file_of, entries = read_headers(folder, files)
    if wrapper := wrapper_of(config_json):
        file_of = {name.removeprefix(TEXT_PREFIX): file for name, file in file_of.items()}
        entries = {name.removeprefix(TEXT_PREFIX): entry for name, entry in entries.items()}
        check_dtypes(folder, file_of, {n: entry for n, entry in entries.items() if n.startswith(wrapper.other_parts)})
    text = {name: entry for name, entry in entries.items() if not wrapper or not name.startswith(wrapper.other_parts)}
    block = read_block(folder / CONFIG_NAME, text_config_dict(config_json))
    check_against_config(folder, config, file_of, text, block)
    others = other_files(folder)
    return SourceCheckpoint(folder, config_json, file_of, entries, config, block, others)


def read_model_config(folder: Path, may_be_link: bool = False) -> tuple[dict[str, Any], DeepseekMoeConfig]:
    """The JSON object of a folder's `config.json`, and what it means.

    Raises:
        CheckpointError: as `read_config`; or it is no configuration of this family, or has a dtype that is none.
    """
    path, config_json = folder / CONFIG_NAME, read_config(folder, may_be_link=may_be_link)
    if not isinstance(config_json.get("model_type"), str):
        raise CheckpointError(f"{path}: model_type={config_json.get('model_type')!a} names no kind of model")
    text = config_json.get("text_config")
    for part in (config_json, text if isinstance(text, dict) else {}):
        for name in ("dtype", "torch_dtype"):
            dtype = part.get(name)
            known = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else None
            if dtype is not None and not (isinstance(known, torch.dtype) and known.is_floating_point):
                raise CheckpointError(f"{path}: {name}={dtype!a} is no floating point type of torch: write bfloat16")
    try:
        return config_json, DeepseekMoeConfig.from_dict(dict(config_json))
    except Exception as error:  # a field of the wrong type can fail anywhere in the configuration classes
        raise CheckpointError(f"{path}: {error or type(error).__name__}") from error


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """Every weight file with the tensors that the index puts there, or None if there is no index."""
    if (folder / SINGLE_NAME).is_file():
        return {SINGLE_NAME: None}
    if (folder / INDEX_NAME).is_file():
        check_links(folder, [INDEX_NAME])
        files: dict[str, list[str] | None] = {}
        for name, file in read_index(folder).items():
            files.setdefault(file, []).append(name)
        wrong = next((file for file in files if not file.endswith(".safetensors")), None)
        if wrong:
            raise CheckpointError(f"{folder / INDEX_NAME} names {wrong}, which is no safetensors file")
        return files
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    hint = f"; {pickles[0]} is a pickle, which can run code and is not read" if pickles else ""
    raise CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")


def read_headers(folder: Path, files) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """The file of every tensor, and its entry there, of files that `weight_files` found.

    Raises:
        CheckpointError: a file is not sound, has a tensor twice, or is not what the index says.
    """
    file_of, entries = {}, {}
    for file, indexed in sorted(files.items()):
        path = folder / file
        found = read_entries(path)
        for name, entry in found.items():
            if name in file_of:
                raise CheckpointError(f"{path}: tensor {name} is in {file_of[name]} as well")
            file_of[name], entries[name] = file, entry
        if indexed is None:
            continue
        for name in indexed:
            if name not in found:
                raise CheckpointError(f"{path} lacks tensor {name}, which {INDEX_NAME} puts there")
        if len(indexed) < len(found):
            stray = next(iter(found.keys() - set(indexed)))
            raise CheckpointError(f"{path} has tensor {stray}, which {INDEX_NAME} does not put there")
    return file_of, entries


def read_block(path: Path, config_json: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of FP8 blocks, as the config in file `path` says.

    Raises:
        CheckpointError: another quantization, or blocks without a size.
    """
    quantization = config_json.get("quantization_config")
    if quantization is None:
        return FP8_BLOCK
    where = f"{path}: quantization_config"
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        raise CheckpointError(f"{where}={quantization!a} is not read; only FP8 blocks are (quant_method 'fp8')")
    block = quantization.get("weight_block_size", list(FP8_BLOCK))
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise CheckpointError(f"{where}.weight_block_size={block!a} is not two positive numbers")
    return block[0], block[1]


def check_against_config(folder: Path, config, file_of, entries, block) -> None:
    """Compares names, shapes and dtypes of the tensors with `config`, which loses the MTP modules that are not there.

    Raises:
        CheckpointError: the tensors are not one whole checkpoint of that config.
    """
    specs = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    moe_layers = sum(map(config.is_moe_layer, range(config.num_hidden_layers + config.num_nextn_predict_layers)))
    if moe_layers and moe_layers * config.n_routed_experts > 4 * len(specs) + 10_000:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: n_routed_experts={config.n_routed_experts} in {moe_layers} layers are far more "
            f"than the {len(specs)} tensors of the folder"
        )
    check_fp8_scales(specs, str(folder), block)
    shapes = {name: shape for name, (_, shape) in specs.items() if not name.endswith(SCALE_SUFFIX)}
    has_mtp = check_tensors(config, shapes, not config.tie_word_embeddings, str(folder))
    expected = expected_tensors(config)
    if not has_mtp:
        expected = {name: spec for name, spec in expected.items() if not is_mtp_tensor(name, config)}
        config.num_nextn_predict_layers = 0
    for name, shape in shapes.items():
        problem = None
        if name not in expected and not is_redundant(name):
            problem = f"belongs to no model of this {CONFIG_NAME}"
        elif name in expected and shape != expected[name][0]:
            problem = f"is {list(shape)} instead of {list(expected[name][0])}"
        if problem:
            raise CheckpointError(f"{folder / file_of[name]}: tensor {name} {problem}")
    check_dtypes(folder, file_of, {name: entries[name] for name in shapes})


def check_dtypes(folder: Path, file_of, entries) -> None:
    """Raises a CheckpointError for a tensor of a type that is not read."""
    for name, entry in entries.items():
        if entry.dtype not in _READ_DTYPES:
            problem = f"is {entry.dtype}, not one of {', '.join(_READ_DTYPES)}"
            raise CheckpointError(f"{folder / file_of[name]}: tensor {name} {problem}")
