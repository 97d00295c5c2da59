"""Checkpoint folders for tests: written as others publish them, read back, compared bit for bit."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, sharded or not."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_bit_equal(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


def written(folder: Path, config_json: dict, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint as others publish it: that json, and those tensors in one file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
