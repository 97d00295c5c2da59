"""ESFT adapters (FACTS 5.4) and models in memory: saving what was trained, putting it on a model."""

import json
import os
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.checkpoint_files import FP8_DTYPE, SINGLE_NAME
from modeling_deepseek_moe.checkpoint_layout import expected_tensors, is_redundant
from modeling_deepseek_moe.conversion.adapters.esft import ESFT_CONFIG, adapted_names, open_esft, trained_names
from modeling_deepseek_moe.loading import with_mtp_copies

from .chosen_experts import is_specialized, published_tensors


def save_esft_adapter(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Writes `expert_cfg.json` and the trained tensors, in the model's dtype under their published names.

    Args:
        model: prepared by `train_chosen`.
        folder: new or empty.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors(model)
    if model.expert_cfg["non_expert_modules"]:
        tensors = with_mtp_copies(model, tensors)
    trained = {name: tensors[name].clone().contiguous() for name in trained_names(model.expert_cfg, tensors)}
    save_file(trained, folder / SINGLE_NAME, metadata={"format": "pt"})
    (folder / ESFT_CONFIG).write_text(json.dumps(model.expert_cfg) + "\n", encoding="utf-8")


def esft_folder(adapter: str | os.PathLike[str]) -> Path | None:
    """Where an ESFT adapter lies, downloaded if it is named by its place on the Hub; None if it is none of ESFT's."""
    if os.path.isdir(adapter):
        return Path(adapter) if (Path(adapter) / ESFT_CONFIG).is_file() else None
    try:
        hf_hub_download(os.fspath(adapter), ESFT_CONFIG)
        return Path(snapshot_download(os.fspath(adapter), allow_patterns=[ESFT_CONFIG, "*.safetensors"]))
    # Not there, not reached, or no name at all; whoever reads the adapter then says which.
    except (OSError, ValueError, EntryNotFoundError):
        return None


@torch.no_grad()
def load_esft_adapter(model: PreTrainedModel, adapter: str | os.PathLike[str]) -> PreTrainedModel:
    """Puts the tensors of an ESFT adapter, ours or DeepSeek's, into a model.

    Args:
        model: the `DeepseekMoeForCausalLM` that the adapter was trained from; it is changed, and returned.
        adapter: folder or Hub name, with `expert_cfg.json` and safetensors files.

    Raises:
        CheckpointError: the adapter is broken or of another model; the model is as it was.
        ValueError: this is no plain causal language model.
    """
    if is_specialized(model):
        raise ValueError("the model is in training: put the adapter on before")
    folder = esft_folder(adapter) or adapter
    adapter = open_esft(folder)
    tensors = published_tensors(model)
    if any(entry.dtype == FP8_DTYPE for entry in adapter.entries.values()):
        raise CheckpointError(f"{folder} has FP8 tensors: merge it with `deepseek-moe convert --adapter`")
    names = expected_tensors(model.config)
    keys = adapted_names(adapter, model.config, names, model.name_or_path or type(model).__name__)
    keys = {name: key for name, key in keys.items() if not is_redundant(name)}
    for name, key in keys.items():
        found, own = list(adapter.entries[key].shape), list(tensors[name].shape)
        if found != own:
            raise CheckpointError(f"{folder}: tensor {key} is {found}, not {own} as in the model")
    for file in sorted(set(adapter.file_of.values())):
        with safe_open(adapter.folder / file, framework="pt") as opened:
            for name, key in keys.items():
                if adapter.file_of[key] == file:
                    tensors[name].copy_(opened.get_tensor(key))
    return model
