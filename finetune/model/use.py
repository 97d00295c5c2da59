"""Models as they are used, not trained: loaded from a folder or the Hub, with an adapter on it."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.expert_lora import load_adapter

from ..errors import UserError
from ..recipe.load import make_recipe
from .esft_adapter import esft_folder, load_esft_adapter
from .load import load
from .lora import known_warnings


def load_for_use(
    model: str | os.PathLike[str],
    dtype: str = "auto",
    adapter: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in evaluation mode, on the GPU if there is one, and its tokenizer.

    Args:
        model: local folder or Hub name.
        dtype: type of the weights in memory: auto (as stored), float32, bfloat16 or float16.
        adapter: folder or Hub name of an adapter to put on it.
        trust_remote_code: run the tokenizer's code where it is code.

    Raises:
        UserError: the model or the adapter cannot be loaded, or they do not belong together.
    """
    folder = Path(model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{str(folder)!r} is an adapter: name its model, and the adapter with --adapter")
    keys = {"model": os.fspath(model), "dtype": dtype, "trust_remote_code": trust_remote_code}
    network, tokenizer = load(make_recipe({**keys, "data": "", "output_dir": ""}))
    if adapter is not None:
        network = put_adapter(network, adapter)
    if torch.cuda.is_available():
        network.to("cuda")
    return network.eval(), tokenizer


def put_adapter(model: PreTrainedModel, adapter: str | os.PathLike[str]) -> PreTrainedModel:
    """The model with an adapter in place.

    Args:
        adapter: folder or Hub name of a LoRA or ESFT adapter.

    Raises:
        UserError: it cannot be read, adds tokens to the prompt, or has weights that the model has no place for.
    """
    adapter = os.fspath(adapter)
    if folder := esft_folder(adapter):
        try:
            return load_esft_adapter(model, folder)
        except (CheckpointError, ValueError) as error:
            raise UserError(f"cannot put adapter {adapter!r} on the model: {error}") from error
    try:
        with known_warnings():
            adapted = load_adapter(model, adapter)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        reason = reason if os.path.exists(adapter) else f"there is no such folder, and from the Hub: {reason}"
        raise UserError(f"cannot put adapter {adapter!r} on the model: {reason}") from error
    if adapted.active_peft_config.is_prompt_learning:
        raise UserError(f"adapter {adapter!r} adds tokens to the prompt: only adapters of weights can be used here")
    return adapted.get_base_model()
