"""Models and adapters that are damaged, or made to do harm, for every verb that reads them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .trying import Case

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer_config.json"
SCALE = "model.layers.0.self_attn.o_proj.weight_scale_inv"
LAYER = "model.layers.1.self_attn.o_proj.weight"
# What each verb is called with; the damaged model is {folder}/model.
VERBS = {
    "chat": ["chat", "{folder}/model", "--max-new-tokens", "2"],
    "evaluate": ["evaluate", "{folder}/model", "--text", "{text}", "--output", "{folder}/out"],
    "experts": ["experts", "{folder}/model", "{rows}", "--output", "{folder}/out"],
    "esft score": ["esft", "score", "{folder}/model", "{rows}", "--output", "{folder}/scores.json"],
    "finetune": [
        *("finetune", "lora_attention", "model={folder}/model", "data={rows}", "output_dir={folder}/run"),
        *("max_length=32", "dtype=auto", "training.max_steps=1"),
    ],
    "convert": ["convert", "{folder}/model", "{folder}/out", "--to", "bf16"],
    "push": ["push", "{folder}/model", "--to", "me/x"],
    "plan": ["plan", "{folder}/model", "lora_all"],
}
LOADING = ("chat", "evaluate", "experts", "esft score", "finetune")


def fields(**changes) -> Callable[[Path], None]:
    """Damage to config.json."""
    return lambda model: _edit_json(model / CONFIG, lambda found: found | changes)


def without(name: str) -> Callable[[Path], None]:
    return lambda model: _edit_json(model / CONFIG, lambda found: {k: v for k, v in found.items() if k != name})


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(content, encoding="utf-8")


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Damage to the tensors."""

    def damage(model: Path) -> None:
        for path in sorted(model.glob("*.safetensors")):
            found = load_file(path)
            change(found)
            save_file(found, path, metadata={"format": "pt"})

    return damage


def value(number: float, name: str = LAYER) -> Callable[[Path], None]:
    return tensors(lambda found: found[name].view(-1)[:1].fill_(number) if name in found else None)


def header(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Callable[[Path], None]:
    """Damage to the JSON at the start of the weights."""

    def damage(model: Path) -> None:
        content = (model / name).read_bytes()
        length = int.from_bytes(content[:8], "little")
        changed = change(content[8 : 8 + length])
        (model / name).write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])

    return damage


def twice(found: bytes) -> bytes:
    fields = json.loads(found)
    entry = json.dumps(fields[LAYER])
    return found.rstrip()[:-1] + f', "{LAYER}": {entry}}}'.encode()


CONFIGS = {
    "no config": lambda model: (model / CONFIG).unlink(),
    "empty config": text(CONFIG, ""),
    "config cut off": text(CONFIG, '{"model_type": "deepseek_v3", '),
    "config is a list": text(CONFIG, "[]"),
    "config is a word": text(CONFIG, '"deepseek_v3"'),
    "deep config": text(CONFIG, "[" * 100_000),
    "deep in the config": text(CONFIG, '{"model_type": "deepseek_v3", "rope_scaling": ' + '{"a":' * 50_000),
    "unknown type": fields(model_type="deepseek_v9"),
    "type is a list": fields(model_type=["deepseek_v3"]),
    "no type": without("model_type"),
    "1e9 layers": fields(num_hidden_layers=10**9),
    "1e9 MTP layers": fields(num_nextn_predict_layers=10**9),
    "1e9 experts": fields(n_routed_experts=10**9, n_group=1, topk_group=1),
    "layers beyond numbers": fields(num_hidden_layers=10**40),
    "no layers": fields(num_hidden_layers=0),
    "negative layers": fields(num_hidden_layers=-1),
    "layers are a word": fields(num_hidden_layers="3"),
    "half a layer": fields(num_hidden_layers=2.5),
    "width of zero": fields(hidden_size=0),
    "width beyond memory": fields(hidden_size=10**12),
    "vocabulary beyond memory": fields(vocab_size=10**15),
    "no heads": fields(num_attention_heads=0),
    "negative rank": fields(kv_lora_rank=-16),
    "infinite epsilon": fields(rms_norm_eps=float("inf")),
    "epsilon is none": fields(rms_norm_eps=float("nan")),
    "more chosen than there are": fields(num_experts_per_tok=99),
    "groups that do not divide": fields(n_group=3),
    "unknown scoring": fields(scoring_func="luck"),
    "unknown activation": fields(hidden_act="os.system"),
    "unknown rope": fields(rope_scaling={"type": "magic", "factor": 2}),
    "rope is a list": fields(rope_scaling=[1, 2]),
    "rope of factor zero": fields(rope_scaling={"type": "yarn", "factor": 0, "original_max_position_embeddings": 64}),
    "theta of zero": fields(rope_theta=0),
    "unknown dtype": fields(torch_dtype="float3"),
    "dtype is a number": fields(torch_dtype=3),
    "unknown quantization": fields(quantization_config={"quant_method": "magic"}),
    "quantization is a word": fields(quantization_config="fp8"),
}
FILES = {
    "no weights": lambda model: (model / WEIGHTS).unlink(),
    "a pickle": lambda model: (model / WEIGHTS).rename(model / "pytorch_model.bin"),
    "empty weights": lambda model: (model / WEIGHTS).write_bytes(b""),
    "weights cut off": lambda model: os.truncate(model / WEIGHTS, 5000),
    "one byte less": lambda model: os.truncate(model / WEIGHTS, (model / WEIGHTS).stat().st_size - 1),
    "weights are text": text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"),
    "a header without end": lambda model: (model / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"),
    "a deep header": header(lambda found: b"[" * 100_000),
    "a header that is a list": header(lambda found: b"[]"),
    "a tensor twice": header(twice),
    "a tensor beyond the file": header(
        lambda found: found.replace(b'"data_offsets":[0,', b'"data_offsets":[9999999999,')
    ),
    "another dtype": header(lambda found: found.replace(b'"F32"', b'"F33"')),
    "a tensor less": tensors(lambda found: found.pop(LAYER)),
    "another shape": tensors(lambda found: found.update({LAYER: torch.ones(3, 3)})),
    "NaN": value(float("nan")),
    "infinity": value(float("inf")),
    "minus infinity": value(float("-inf")),
    "NaN in an expert": value(float("nan"), "model.layers.1.mlp.experts.3.up_proj.weight"),
    "NaN in a bias": value(float("nan"), "model.layers.1.mlp.gate.e_score_correction_bias"),
    "an index that leads out": lambda model: _index(model, "../model.safetensors"),
    "an index that names nothing": lambda model: _index(model, "absent.safetensors"),
    "an index that is a list": lambda model: [_index(model, "x"), text(f"{WEIGHTS}.index.json", "[]")(model)],
    "a tensor in two files": lambda model: _two_files(model),
}
TOKENIZERS = {
    "no tokenizer": lambda model: [path.unlink() for path in model.glob("tokenizer*")],
    "tokenizer cut off": text("tokenizer.json", '{"version": '),
    "deep tokenizer": text("tokenizer.json", "[" * 100_000),
    "tokenizer is a list": text("tokenizer.json", "[]"),
    "deep tokenizer config": text(TOKENIZER, "[" * 100_000),
    "tokenizer config is a list": text(TOKENIZER, "[]"),
    "tokenizer of another model": fields(vocab_size=64),
    "deep generation config": text("generation_config.json", "[" * 100_000),
    "generation config is a list": text("generation_config.json", "[]"),
    "generation config cut off": text("generation_config.json", "{"),
    "deep special tokens": text("special_tokens_map.json", "[" * 100_000),
    "deep added tokens": text("added_tokens.json", "[" * 100_000),
    "a template that is no text": lambda model: (model / "chat_template.jinja").write_bytes(b"\xff\xfe\0"),
    "an end that is a word": text("generation_config.json", '{"eos_token_id": "stop"}'),
    "a temperature that is a word": text("generation_config.json", '{"do_sample": true, "temperature": "hot"}'),
    "a top_p that is none": text("generation_config.json", '{"do_sample": true, "top_p": NaN}'),
    "a top_p of a list": text("generation_config.json", '{"do_sample": true, "top_p": [1]}'),
    "tokenizer is code": lambda model: _code(model),
}
ENDLESS = "".join(f"{{% for {i} in range(99999) %}}" for i in "ijk") + 3 * "{% endfor %}"
TEMPLATES = {
    "an endless template": (ENDLESS, "did not come to an end"),
    "a power in the template": ("{{ 9 ** 9 ** 9 }}", "computes a power"),
    "a template that is none": ("{% for x in %}", "chat template"),
    "a template that fails": ("{{ messages[99].content.x }}", "chat template"),
    "a template that divides by zero": ("{{ 1 / 0 }}", "chat template"),
    "a template that calls itself": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "chat template"),
    "a template that reaches out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template"),
    "a template that imports": ("{% include 'etc/passwd' %}", "chat template"),
}


def config_cases() -> Iterator[Case]:
    """config.json, for verbs that load, convert, publish and plan."""
    for name, damage in CONFIGS.items():
        for verb in ("chat", "convert", "push", "plan"):
            if (verb, name) in _FINE:
                continue
            yield _case(verb, name, damage)


# `plan` reads no weights, so what a width of 1e12 needs is an answer; who converts does not look at how it computes.
_FINE = {("plan", "width beyond memory"), ("plan", "vocabulary beyond memory"), ("plan", "no type")}


def file_cases() -> Iterator[Case]:
    """Weights, for all verbs that read them."""
    for name, damage in FILES.items():
        for verb in (
            ("chat", "push", "finetune") if "NaN" in name or "infinity" in name else ("chat", "convert", "push")
        ):
            yield _case(verb, name, damage)
    for verb in LOADING:
        yield _case(verb, "NaN", FILES["NaN"], "holds values that are not finite")
        yield _case(verb, "a tensor twice", FILES["a tensor twice"], "is there twice")
    scales = {"NaN scale": float("nan"), "infinite scale": float("inf")}
    for name, number in scales.items():
        for verb in ("chat", "convert", "push"):
            yield _case(verb, name, value(number, SCALE), source="fp8")


def tokenizer_cases() -> Iterator[Case]:
    for name, damage in TOKENIZERS.items():
        for verb in ("chat", "finetune", "evaluate"):
            yield _case(verb, name, damage)


def template_cases() -> Iterator[Case]:
    for name, (template, says) in TEMPLATES.items():
        for verb in ("chat", "finetune"):
            yield _case(verb, name, text("chat_template.jinja", template), says)


def _case(verb: str, name: str, damage: Callable, says: str = "", source: str = "base") -> Case:
    def prepare(folder: Path, places: dict[str, Path]) -> None:
        shutil.copytree(places[source], folder / "model")
        damage(folder / "model")

    arguments = [argument.replace("{rows}", "{chats}") for argument in VERBS[verb]]
    return Case(f"{verb}: {name}", arguments, prepare, stdin="w1 w2\n", says=says)


def _edit_json(path: Path, change: Callable[[dict], dict]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))), encoding="utf-8")


def _code(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "mine.py").write_text("class Mine: ...")
    _edit_json(model / TOKENIZER, lambda found: found | {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}})


def _index(model: Path, file: str) -> None:
    names = load_file(model / WEIGHTS)
    (model / WEIGHTS).rename(model / "one.safetensors")
    weight_map = dict.fromkeys(names, "one.safetensors") | {LAYER: file}
    (model / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8"
    )


def _two_files(model: Path) -> None:
    found = load_file(model / WEIGHTS)
    _index(model, "two.safetensors")
    save_file({LAYER: found[LAYER] + 1}, model / "two.safetensors", metadata={"format": "pt"})
