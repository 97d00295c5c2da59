"""How a published model or adapter is loaded and served: the code of its card."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig
from modeling_deepseek_moe.conversion.adapters.files import ADAPTER_CONFIG
from modeling_deepseek_moe.conversion.formats.native import NATIVE_MODELS
from modeling_deepseek_moe.distribution import how_to_install
from modeling_deepseek_moe.families import FAMILIES

_UNKNOWN_BASE = "BASE"
# Ranks that vLLM reserves room for.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_KNOWN_TO_TRANSFORMERS = ("deepseek_v2", "deepseek_v3")


@dataclass(frozen=True)
class Way:
    """One way to use what is in a repository.

    Attributes:
        title: what it is loaded with.
        code: lines to type; empty if there are none.
        language: python or bash.
        note: what to know before.
    """

    title: str
    code: str
    language: str = "python"
    note: str = ""


def ways_to_load(
    folder: Path, kind: str, repo_id: str, base: str | None, base_json: dict[str, Any] | None = None
) -> list[Way]:
    """The ways to load what a repository holds, the plainest first.

    Args:
        folder: one with the same files.
        kind: adapter, model, code or one of DeepSeek's model types.
        repo_id: name of the repository.
        base: name of the base on the Hub, if it has one.
        base_json: its `config.json`, if that is at hand.
    """
    if kind == "adapter":
        to, refusal = serving_type(base_json) if base_json else ("bf16", "")
        names = repo_id, base or _UNKNOWN_BASE, to, refusal
        if (folder / ADAPTER_CONFIG).is_file():
            is_native = (base_json or {}).get("model_type") in _KNOWN_TO_TRANSFORMERS
            ways = _lora(folder, *names, is_native)
        else:
            ways = _esft(*names)
        return [_with_trust(way, folder) for way in ways]
    fields = json.loads((folder / "config.json").read_bytes())
    if kind == "code":
        plain = [
            _model("Transformers alone, with the code in this repository", repo_id, "", ", trust_remote_code=True"),
            _model("This package", repo_id, _registering()),
        ]
    elif _has_own_class(fields["model_type"]):
        own = f"""from modeling_deepseek_moe import DeepseekMoeForCausalLM  # {how_to_install()}

model = DeepseekMoeForCausalLM.from_pretrained("{repo_id}", dtype="auto")"""
        note = "It decodes on the compressed cache, and can be trained further with balance losses."
        plain = [_model("Transformers", repo_id, ""), Way("This package", own, note=note)]
    else:
        plain = [_model("Transformers with this package", repo_id, _registering())]
    return [*(_with_trust(way, folder) for way in plain), _serving(fields, repo_id)]


def _with_trust(way: Way, folder: Path) -> Way:
    """The same where the tokenizer is code, which transformers runs only if told to."""
    config = folder / "tokenizer_config.json"
    if not config.is_file() or "auto_map" not in json.loads(config.read_bytes()):
        return way
    code = re.sub(r'(AutoTokenizer\.from_pretrained\("[^"]*")\)', r"\1, trust_remote_code=True)", way.code)
    return dataclasses.replace(way, code=code)


def _registering() -> str:
    return f"import modeling_deepseek_moe  # {how_to_install()}\n"


def _model(title: str, repo_id: str, first: str, options: str = "") -> Way:
    code = f"""{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}", dtype="auto"{options})
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")"""
    return Way(title, code)


def is_lost_on_native_classes(adapter_config: dict[str, Any]) -> bool:
    """Whether PEFT drops a part of an adapter on transformers' own DeepSeek classes, without a word."""
    targets = json.dumps(adapter_config.get("target_modules"))
    return any(name in targets for name in ("gate_proj", "up_proj", "down_proj", "all-linear"))


def _native_class(config: dict[str, Any], repo_id: str, base: str) -> Way:
    is_lost = is_lost_on_native_classes(config)
    note = "It loads there as it is."
    if is_lost:
        note = (
            "PEFT takes targets called gate_proj, up_proj and down_proj for those of routed experts there, and drops "
            "LoRA on shared experts and dense layers without a word. Export the adapter first, with this package: "
            f"`hf download {repo_id} --local-dir adapter`, `deepseek-moe convert adapter native --to peft-native`."
        )
    code = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(model, "{"native" if is_lost else repo_id}")"""
    return Way("Transformers' own class and PEFT, without this package", code, note=note)


def _lora(folder: Path, repo_id: str, base: str, to: str, refusal: str, is_native: bool) -> list[Way]:
    config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    load = f"""from transformers import AutoTokenizer
from modeling_deepseek_moe import DeepseekMoeForCausalLM  # {how_to_install()}
from {{module}}

model = DeepseekMoeForCausalLM.from_pretrained("{base}", dtype="auto")
model = {{function}}(model, "{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")"""
    ours = load.format(module="modeling_deepseek_moe.expert_lora import load_adapter", function="load_adapter")
    pefts = load.format(module="peft import PeftModel", function="PeftModel.from_pretrained")
    slower = "The same numbers; on routed experts PEFT's own layer is slower and needs more memory."
    ways = [Way("Transformers and PEFT, with this package", ours), Way("PEFT's own layer", pefts, note=slower)]
    ways += [_native_class(config, repo_id, base)] if is_native else []
    merged = _merged(repo_id, base, to or "plain")
    if not to:
        return [*ways, Way("A whole model", merged, "bash"), _no_server(refusal)]
    if reason := _why_not_beside_the_base(config, to):
        return [*ways, Way("vLLM and SGLang", merged + _SERVE, "bash", f"Merged into the base, since {reason}.")]
    return [*ways, _served_adapter(config, repo_id, base), Way("A whole model", merged, "bash")]


_SERVE = "\nvllm serve tuned        # or: python -m sglang.launch_server --model-path tuned"


def _merged(repo_id: str, base: str, to: str) -> str:
    return f"""hf download {base} --local-dir base
hf download {repo_id} --local-dir adapter
deepseek-moe convert base tuned --to {to} --adapter adapter"""


def _why_not_beside_the_base(config: dict[str, Any], to: str) -> str:
    """Why servers had better get a merged model; empty if they can take the adapter."""
    if to != "bf16":
        return f"they know the base as the type {to} only"
    targets = json.dumps([config.get("target_modules"), config.get("target_parameters")])
    if config.get("modules_to_save"):
        return "it has whole tensors beside the factors, which servers do not take from an adapter"
    if "kv_b_proj" in targets:
        return "vLLM leaves LoRA on kv_b_proj out of its absorbed decoding"
    if "mlp.gate.weight" in targets:
        return "it adapts the router, for which servers have no LoRA layer"
    return "it is not plain LoRA" if config.get("use_dora") else ""


def _served_adapter(config: dict[str, Any], repo_id: str, base: str) -> Way:
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    rank = next((rank for rank in _VLLM_RANKS if rank >= max(ranks)), max(ranks))
    code = f"""hf download {repo_id} --local-dir adapter
deepseek-moe convert adapter served --to peft-per-expert
vllm serve {base} --enable-lora --lora-modules tuned=served --max-lora-rank {rank}
python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths tuned=served"""
    return Way("vLLM and SGLang", code, "bash", "Servers read a pair of factors for every expert.")


def _esft(repo_id: str, base: str, to: str, refusal: str) -> list[Way]:
    note = "The adapter holds whole tensors of the experts that were trained; in the base, they make the tuned model."
    load = f"""from transformers import AutoTokenizer
from modeling_deepseek_moe import DeepseekMoeForCausalLM  # {how_to_install()}

model = DeepseekMoeForCausalLM.from_pretrained("tuned", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("tuned")"""
    serve = Way("vLLM and SGLang, from that folder", _SERVE.strip(), "bash") if to else _no_server(refusal)
    return [
        Way("A folder with the tuned model", _merged(repo_id, base, to or "plain"), "bash", note),
        Way("Transformers with this package, from that folder", load),
        serve,
    ]


def _serving(fields: dict[str, Any], repo_id: str) -> Way:
    to, refusal = serving_type(fields)
    if not to:
        return _no_server(refusal)
    if to == "bf16":
        return Way(
            "vLLM and SGLang",
            f"vllm serve {repo_id}        # or: python -m sglang.launch_server --model-path {repo_id}",
            "bash",
        )
    code = f"""hf download {repo_id} --local-dir model
deepseek-moe convert model tuned --to {to}"""
    return Way("vLLM and SGLang", code + _SERVE, "bash", f"They know it as the type {to}.")


def _has_own_class(model_type: str) -> bool:
    return model_type in _KNOWN_TO_TRANSFORMERS or (model_type in FAMILIES and FAMILIES[model_type].keeps_type)


def serving_type(config_json: dict[str, Any]) -> tuple[str, str]:
    """The format of `deepseek-moe convert` that servers read, bf16 where they know the type; or why there is none."""
    if config_json.get("model_type") != DeepseekMoeConfig.model_type:
        return "bf16", ""
    config = DeepseekMoeConfig.from_dict(dict(config_json))
    nearest = (
        "deepseek"
        if config.kv_lora_rank is None
        else "deepseek_v3"
        if config.topk_method == "noaux_tc"
        else "deepseek_v2"
    )
    try:
        NATIVE_MODELS[nearest].check(config)
    except CheckpointError as error:
        return "", str(error)
    return nearest, ""


def _no_server(refusal: str) -> Way:
    return Way("vLLM and SGLang", "", note=f"They know no type that can express this model: {refusal}.")
