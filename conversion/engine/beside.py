"""What lies beside the weights of a checkpoint: configs that are read, and files that are taken along."""

from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.checkpoint_files import is_plain_name, read_json

CONFIG_NAME = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
RECORD_NAME = "conversion.json"
MAX_LAYERS = 10_000
LAYER_FIELDS = ("num_hidden_layers", "num_nextn_predict_layers", "num_mtp_layers")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES, ".gguf", ".h5", ".msgpack", ".npz")


def read_config(folder: Path, name: str = CONFIG_NAME, may_be_link: bool = False) -> dict[str, Any]:
    """The JSON object in file `name`, which has to lie in the folder itself if it is taken along.

    Raises:
        CheckpointError: there is no such file or no object in it, or it describes more layers than any model has.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {name}")
    if not may_be_link:
        check_links(folder, [name])
    try:
        config_json = read_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config_json, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    for part in (config_json, config_json.get("text_config")):
        for field in LAYER_FIELDS if isinstance(part, dict) else ():
            layers = part.get(field)
            if isinstance(layers, int | float) and layers > MAX_LAYERS:
                raise CheckpointError(f"{path}: {field}={layers} is more than the {MAX_LAYERS} layers read here")
    return config_json


def check_links(folder: Path, names) -> None:
    """Refuses links out of the folder, except the ones that huggingface_hub's own cache is made of."""
    folder = folder.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    for name in names:
        target = (folder / name).resolve()
        if target.parent not in (folder, blobs):
            raise CheckpointError(f"{folder / name} is a link out of its folder, to {target}")


def tokenizer_code(folder: Path) -> set[str]:
    """Names of the files with the code of a tokenizer that is code; no other Python of a checkpoint is taken along.

    Raises:
        CheckpointError: `tokenizer_config.json` cannot be read.
    """
    if not (folder / TOKENIZER_CONFIG).is_file():
        return set()
    code = code_of_tokenizer(read_config(folder, TOKENIZER_CONFIG))
    name = f"{code.rpartition('.')[0]}.py" if code else ""
    source = folder / name
    if not is_plain_name(name) or not source.is_file():  # elsewhere, or in another repository
        return set()
    try:
        return {Path(path).name for path in (source, *get_relative_import_files(source))}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{source}: what it imports cannot be read: {error}") from error


def code_of_tokenizer(config: dict[str, Any]) -> str | None:
    """The class that a tokenizer's config names as its code, "module.Class"; the faster one, if there are two."""
    auto_map = config.get("auto_map") or {}
    classes = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    classes = [classes] if isinstance(classes, str) else classes if isinstance(classes, list) else []
    return next((name for name in reversed(classes) if isinstance(name, str) and name), None)


def without_local_code(fields: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` that names no code which would have to lie beside it."""
    named = fields.get("auto_map")
    elsewhere = {name: code for name, code in named.items() if "--" in str(code)} if isinstance(named, dict) else {}
    rest = {name: value for name, value in fields.items() if name != "auto_map"}
    return rest | ({"auto_map": elsewhere} if elsewhere else {})


def other_files(folder: Path) -> list[str]:
    """Names of what lies beside the weights and may be taken along: tokenizer, licence and so on.

    Raises:
        CheckpointError: one is a link out of the folder.
    """
    code = tokenizer_code(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and is_other_file(path.name))
    names = [name for name in names if not name.endswith(".py") or name in code]
    check_links(folder, names)
    return names


def is_other_file(name: str) -> bool:
    """Whether a file is neither weights, index nor config: tokenizer, licence and so on."""
    is_weight = name.endswith(_WEIGHT_SUFFIXES) or name.endswith(".index.json")
    return not is_weight and not name.startswith(".") and name not in (CONFIG_NAME, RECORD_NAME)
