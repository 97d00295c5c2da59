"""Models as they are used, not trained: loaded from a folder or the Hub, with an adapter on it."""

import contextlib
import json
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.checkpoint_files import read_entries
from modeling_deepseek_moe.conversion.adapters.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_lora_fields
from modeling_deepseek_moe.conversion.engine.beside import read_config
from modeling_deepseek_moe.expert_lora import load_adapter

from ..errors import UserError, first_line
from ..recipe.load import make_recipe
from ..recipe.schema import Recipe
from .checks import check_finite
from .esft_adapter import esft_folder, load_esft_adapter
from .load import load
from .lora import known_warnings

_WAYS = ("auto", "balanced", "balanced_low_0", "sequential")


def load_for_use(
    model: str | os.PathLike[str],
    dtype: str = "auto",
    adapter: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    text_only: bool = False,
    device_map: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in evaluation mode, on the GPU if there is one or where `device_map` says, and its tokenizer.

    Args:
        model: local folder or Hub name.
        dtype: type of the weights in memory: auto (as stored), float32, bfloat16 or float16.
        adapter: folder or Hub name of an adapter to put on it.
        trust_remote_code: run the tokenizer's code where it is code.
        text_only: of a model of several parts load the text part alone.
        device_map: "auto" fills GPUs, then the CPU, then the disk; a device; or a JSON object, from the name of a
            module to a device or "disk". Weights go there as they are read. Without it the whole model is loaded
            on the CPU first.

    Raises:
        UserError: the model or the adapter cannot be loaded, or they do not belong together.
    """
    folder = Path(model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{str(folder)!r} is an adapter: name its model, and the adapter with --adapter")
    keys = {"model": os.fspath(model), "dtype": dtype, "text_only": text_only, "trust_remote_code": trust_remote_code}
    recipe = make_recipe({**keys, "data": "", "output_dir": ""})
    if device_map is None:
        network, tokenizer = load(recipe)
    else:
        network, tokenizer = _load_placed(recipe, read_device_map(device_map))
    if adapter is not None:
        network = put_adapter(network, adapter)
    if device_map is None and torch.cuda.is_available():
        network.to("cuda")
    return network.eval(), tokenizer


def read_device_map(text: str) -> str | dict[str, str | int]:
    """What `from_pretrained` takes for a device map that a user wrote.

    Raises:
        UserError: it is none, or names a device that is not here.
    """
    if text in _WAYS:
        return text
    places: Any = {"": text}
    if text.lstrip().startswith("{"):
        try:
            places = json.loads(text)
        except ValueError as error:
            raise UserError(f"--device-map is no JSON object: {first_line(error)}") from error
    for place in places.values():
        try:
            if place != "disk" and type(place) in (str, int):
                torch.empty(0, device=place)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            ways = ", ".join(_WAYS)
            raise UserError(
                f"--device-map names {place!r}, which is no device of this machine: give {ways}, a device such as "
                "cuda:0 or cpu, or a JSON object from modules to devices"
            ) from error
        if type(place) not in (str, int):
            raise UserError(f"--device-map names {place!r}: a module goes to a device or to disk")
    return places


def _load_placed(
    recipe: Recipe, places: str | dict[str, str | int]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = tempfile.mkdtemp(prefix="deepseek-moe-offload-")
    try:
        network, tokenizer = load(recipe, device_map=places, offload_folder=folder)
        if network.get_input_embeddings().weight.is_meta:
            raise UserError(
                "--device-map leaves model.embed_tokens, which reads the tokens, where nothing computes: give it a "
                "device that does"
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(network, shutil.rmtree, folder, ignore_errors=True)
    return network, tokenizer


def put_adapter(model: PreTrainedModel, adapter: str | os.PathLike[str]) -> PreTrainedModel:
    """The model with an adapter in place.

    Args:
        adapter: folder or Hub name of a LoRA or ESFT adapter.

    Raises:
        UserError: it cannot be read, adds tokens to the prompt, or has weights that the model has no place for.
    """
    adapter = os.fspath(adapter)
    check_in_place(model, adapter)
    # An ESFT adapter's tensors take the place of the model's.
    before = set() if (esft := esft_folder(adapter)) else {id(tensor) for tensor in model.parameters()}
    try:
        if esft:
            adapted = load_esft_adapter(model, esft)
        else:
            check_adapter_files(adapter)
            with known_warnings():
                adapted = load_adapter(model, adapter)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split()) or type(error).__name__
        reason = reason if os.path.exists(adapter) else f"there is no such folder, and from the Hub: {reason}"
        raise UserError(f"cannot put adapter {adapter!r} on the model: {reason}") from error
    if not esft:
        if adapted.active_peft_config.is_prompt_learning:
            raise UserError(
                f"adapter {adapter!r} adds tokens to the prompt: only adapters of weights can be used here"
            )
        adapted = adapted.get_base_model()
    new = ((name, tensor) for name, tensor in adapted.named_parameters() if id(tensor) not in before)
    check_finite(new, f"adapter {adapter!r}")
    return adapted


def check_in_place(model: PreTrainedModel, adapter: str) -> None:
    """Raises a UserError if a device map keeps weights off the device that computes: there is no adapting them."""
    if away := next((name for name, tensor in model.named_parameters() if tensor.is_meta), None):
        raise UserError(
            f"adapter {adapter!r} cannot be put on weights that --device-map keeps off their device, such as {away}: "
            f"merge it first (`deepseek-moe convert MODEL DST --to bf16 --adapter {adapter}`) and name DST"
        )


def check_adapter_files(adapter: str) -> None:
    """Checks what PEFT would not before it reads a LoRA adapter: the config's values, and the header of the weights.

    Args:
        adapter: folder or Hub name; what is not there is left to PEFT to say.

    Raises:
        CheckpointError: one line that names the file, and the field or tensor.
        OSError: the Hub cannot be asked.
    """
    if os.path.isdir(adapter):
        paths = [Path(adapter) / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    else:
        paths = []
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            with contextlib.suppress(EntryNotFoundError):
                paths.append(Path(hf_hub_download(adapter, name)))
    there = [path for path in paths if path.is_file()]
    if there and not any(path.name == ADAPTER_WEIGHTS for path in there):
        raise CheckpointError(f"it has no {ADAPTER_WEIGHTS}; pickles, which can run code, are not read")
    for path in there:
        if path.name == ADAPTER_WEIGHTS:
            read_entries(path)
        elif (fields := read_config(path.parent, path.name, may_be_link=True)).get("peft_type") == "LORA":
            check_lora_fields(path, fields)
