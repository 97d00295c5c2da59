"""The folder that is pushed: weights in the form that was asked for, checked; hard links where they stay as they are.

RUN.push.aside/weights    a conversion, if one is needed; a stopped one goes on
RUN.push.aside/upload     what the repository will hold
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from rich.console import Console
from rich.progress import track
from rich.text import Text
from safetensors import safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.checkpoint_files import read_entries
from modeling_deepseek_moe.conversion import convert
from modeling_deepseek_moe.conversion.adapters.esft import ESFT_CONFIG, open_esft
from modeling_deepseek_moe.conversion.adapters.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from modeling_deepseek_moe.conversion.engine.beside import CONFIG_NAME, RECORD_NAME, without_local_code
from modeling_deepseek_moe.conversion.engine.source import open_source
from modeling_deepseek_moe.conversion.formats.native import NATIVE_MODELS
from modeling_deepseek_moe.conversion.request import plan_request
from modeling_deepseek_moe.finite import all_finite

from ..errors import UserError, first_line
from ..files import write_text
from ..runs.results import RunResults
from .parts import is_beside_weights, parts_of
from .upload import HUB_FAILURES, read_file, without_secrets

CARD = "README.md"
_AUTO_CLASSES = {"AutoConfig": DeepseekMoeConfig, "AutoModelForCausalLM": DeepseekMoeForCausalLM}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx")
_NOT_PUSHED = {CARD, RECORD_NAME}  # written anew; of the conversion alone


def choose_kind(
    results: RunResults,
    adapter_only: bool = False,
    merged: bool = False,
    native: str | None = None,
    with_code: bool = False,
) -> str:
    """What is to be pushed: adapter, model, code or one of DeepSeek's own model types.

    Raises:
        UserError: two options that exclude each other, an unknown type, or the run has no adapter or only one.
    """
    options = {"--adapter-only": adapter_only, "--merged": merged, "--native": native, "--with-code": with_code}
    asked = [option for option, value in options.items() if value]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} ask for different things: give one of them")
    if native and native not in NATIVE_MODELS:
        raise UserError(f"--native {native!r} is none of {', '.join(NATIVE_MODELS)}")
    if adapter_only and results.adapter is None:
        raise UserError(f"{results.folder} has no adapter, which --adapter-only asks for: its whole model was trained")
    if native or with_code:
        return native or "code"
    return "adapter" if adapter_only or (results.model is None and not merged) else "model"


def check_weights(folder: Path) -> None:
    """Reads the weights of a folder once, before anything is made of them.

    Raises:
        UserError: a value is not a number.
        CheckpointError: something is missing or broken.
    """
    if (folder / ESFT_CONFIG).is_file():
        open_esft(folder)
    elif (folder / ADAPTER_CONFIG).is_file():
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise CheckpointError(f"{folder} has no {ADAPTER_WEIGHTS}")
        read_entries(folder / ADAPTER_WEIGHTS)
    else:
        open_source(folder)
    console = Console(stderr=True)
    for path in track(sorted(folder.glob("*.safetensors")), "checking", console=console, transient=True):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not all_finite(file.get_tensor(name)):
                    raise UserError(f"{path}: {name} has values that are not finite numbers; nothing is pushed")


def stage(results: RunResults, kind: str, work: Path, base: str | None, fetch: Callable[[str], Path]) -> Path:
    """The folder to push, without its card.

    Args:
        results: what there is.
        kind: what is pushed, as `choose_kind` says it.
        work: folder for what is made on the way; what an earlier call left in it is used again.
        base: name that the adapter says it is for, instead of a folder on this machine.
        fetch: the folder of a model on the Hub.

    Raises:
        UserError, CheckpointError: the weights are not whole, or cannot be expressed in this kind.
    """
    weights = results.adapter if kind == "adapter" else results.model
    check_weights(weights or results.adapter)
    if weights is None or kind in NATIVE_MODELS:
        weights = _converted(results, kind, work / "weights", base, fetch)
    upload = work / "upload"
    shutil.rmtree(upload, ignore_errors=True)
    upload.mkdir(parents=True)
    parts = parts_of(weights)
    if weights in (results.adapter, results.model):
        _say_what_stays(weights, parts)
    if kind != "adapter" and results.adapter and results.model is None:
        # The run's tokenizer may have another chat template than the base's.
        parts |= {name: path for name, path in parts_of(results.adapter).items() if is_beside_weights(name)}
    for name, path in parts.items():
        _link(path, upload / name)
    if (upload / ADAPTER_CONFIG).is_file():  # a folder on this machine is nobody's base elsewhere
        _change_json(upload / ADAPTER_CONFIG, lambda fields: fields | {"base_model_name_or_path": base})
    if (upload / CONFIG_NAME).is_file():
        _change_json(upload / CONFIG_NAME, without_local_code)
    if kind == "code":
        add_code(upload)
    return upload


def add_code(folder: Path) -> None:
    """Puts the model's code beside its weights, so that it loads by `trust_remote_code=True` without this package.

    `config.json` becomes this package's own, whatever type it was, and names the code.
    """
    config = DeepseekMoeConfig.from_pretrained(folder)
    config.architectures, config.family = [DeepseekMoeForCausalLM.__name__], None
    fields = json.loads(config.to_json_string())
    fields["auto_map"] = {}
    for auto_class, own in _AUTO_CLASSES.items():
        source = sys.modules[own.__module__].__file__
        fields["auto_map"][auto_class] = f"{Path(source).stem}.{own.__name__}"
        for path in (source, *get_relative_import_files(source)):
            shutil.copyfile(path, folder / Path(path).name)
    _write_json(folder / "config.json", fields)


def fetch_base(name: str, endpoint: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a model on the Hub, downloaded if it is not in the cache.

    Raises:
        UserError: it cannot be had.
    """
    try:
        return Path(HfApi(endpoint=endpoint, token=token).snapshot_download(name, ignore_patterns=list(_PICKLES)))
    except HUB_FAILURES as error:
        reason = without_secrets(first_line(error), token)
        raise UserError(f"cannot download {name!r}, which the adapter is to be merged into: {reason}") from None


def read_base_config(
    results: RunResults, base: str | None, endpoint: str | None = None, token: str | bool | None = None
) -> dict[str, Any] | None:
    """The base's `config.json`, from its folder or the Hub; None if neither has one."""
    if results.base and (path := Path(results.base) / "config.json").is_file():
        text = path.read_text("utf-8")
    else:
        text = read_file(base, "config.json", endpoint, token) if base else ""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _converted(results: RunResults, kind: str, target: Path, base: str | None, fetch: Callable[[str], Path]) -> Path:
    options: dict[str, Any] = {}
    source = results.model
    if source is None:
        options["adapter"] = results.adapter
        name = results.base if results.base and Path(results.base).is_dir() else base or results.base
        if not name:
            raise UserError(f"nothing says which model {results.adapter} was trained on: give --base")
        source = Path(name) if Path(name).is_dir() else fetch(name)
    to = kind if kind in NATIVE_MODELS else "plain"
    request = plan_request(source, target, to, options)
    record = {**request.record, "source": request.plan.source.fingerprint()}
    if (target / RECORD_NAME).is_file() and json.loads((target / RECORD_NAME).read_bytes()) != record:
        shutil.rmtree(target)  # of an earlier call that was about something else
    convert(source, target, to, **options)
    return target


def _say_what_stays(folder: Path, parts: dict[str, Path]) -> None:
    pushed = {name.partition("/")[0] for name in parts}
    others = sorted(path.name for path in folder.iterdir() if path.name not in pushed | _NOT_PUSHED)
    if others:
        line = f"not pushed, for they are no part of {folder.name}: {', '.join(others)}"
        Console().print(Text(line), soft_wrap=True)


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(path, target)


def _change_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    fields = json.loads(path.read_bytes())
    if (changed := change(fields)) != fields:
        _write_json(path, changed)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    """Writes a new file, since the old one may be a link to that of the run."""
    write_text(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
