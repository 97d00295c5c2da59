"""What a model's files may say and hold, checked where transformers would fall over it or go on without a word."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.conversion.engine.beside import CONFIG_NAME, read_config
from modeling_deepseek_moe.conversion.engine.source import read_model_config
from modeling_deepseek_moe.families import text_config_dict
from modeling_deepseek_moe.finite import all_finite

from .._compat import quantization_methods
from ..errors import UserError

GENERATION = "generation_config.json"


def check_configs(model: str) -> None:
    """Checks `config.json` and `generation_config.json` of a folder or of a model on the Hub, if they are there.

    Raises:
        CheckpointError: one line that names file and field.
    """
    if (folder := _folder_with(model, CONFIG_NAME)) is not None:
        config_json, _ = read_model_config(folder, may_be_link=True)
        quantization = text_config_dict(config_json).get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        # bitsandbytes is a method of two kinds, which other fields tell apart.
        if quantization is not None and method not in {"bitsandbytes", *quantization_methods()}:
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: quantization_config={quantization!a} names no known method"
            )
    if (folder := _folder_with(model, GENERATION)) is not None:
        fields = read_config(folder, GENERATION, may_be_link=True)
        for name, (is_sound, wanted) in _GENERATION_FIELDS.items():
            if (value := fields.get(name)) is not None and not is_sound(value):
                raise CheckpointError(f"{folder / GENERATION}: {name}={value!a} is not {wanted}")


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """Raise a UserError that names the first of these tensors with a value that is no finite number.

    Args:
        tensors: by name.
        source: what they are of, for the message.
    """
    for name, tensor in tensors:
        if not all_finite(tensor):
            raise UserError(
                f"{source}: {name} holds values that are not finite numbers, so nothing computed by it would be: get "
                "the files again"
            )


def _folder_with(model: str, name: str) -> Path | None:
    """Where a file of a model lies, downloaded if the model is one of the Hub; None if it has none."""
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(hf_hub_download(model, name)).parent
        except (OSError, ValueError):  # not there or not reached, which the loading says
            return None
    return folder if (folder / name).is_file() else None


def _is_token(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_Field = tuple[Callable[[Any], bool], str]
_ONE_TOKEN: _Field = (_is_token, "the number of a token")
_GENERATION_FIELDS: dict[str, _Field] = {
    "bos_token_id": _ONE_TOKEN,
    "pad_token_id": (lambda value: value == -1 or _is_token(value), "the number of a token, or -1 for none"),
    "eos_token_id": (
        lambda value: _is_token(value) or (isinstance(value, list) and all(map(_is_token, value))),
        "the number of a token, or a list of such",
    ),
    "temperature": (lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
    "top_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a share, from 0 to 1"),
    "top_k": (_is_token, "a whole number"),
    "repetition_penalty": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
}
