"""Recipes that nobody can follow: numbers out of range, values of another kind, files that are no recipe."""

import os
import socket
from collections.abc import Iterator

from .trying import Case

RECIPE = """
model: {base}
data: {rows}
output_dir: {folder}/run
max_length: 32
training: {{max_steps: 2, per_device_train_batch_size: 2, save_steps: 1}}
"""
# Besides these, every number of the table is given what no number can be.
SECTION_NEEDS = {"lora": ["lora.targets=all"], "esft": ["esft.score=token"], "dpo": ["dpo.beta=0.1"]}
EVERY_NUMBER = ("-1", "nan", "inf", "-inf", "100000000000000000000", "1e40", "true", "word", "[]")
# Values that are no numbers out of a range, and yet of no use.
VALUES = (
    "dtype=float8",
    "quantization=int4",
    "long_rows=shorten",
    "bad_rows=ignore",
    "merge=perhaps",
    "watch=2",
    "metric=./absent.py",
    "metric=/",
    "attn_implementation=nothing",
    "experts_implementation=nothing",
    "lora.targets=[]",
    "lora.targets=[everything]",
    "lora.targets=7",
    "lora.targets=[1, 2]",
    "lora.rank_pattern={q_proj: 2.5}",
    "lora.rank_pattern={q_proj: big}",
    "lora.rank_pattern={'(': 4}",
    "lora.rank_pattern={'(a+)+$': 4}",
    "lora.alpha_pattern={'(.*a){30}': 4}",
    "lora.layer_replication=[[0]]",
    "lora.layer_replication=[0, 1]",
    "lora.layers_to_transform=[a]",
    "lora.layers_to_transform=[99]",
    "lora.init_lora_weights=magic",
    "lora.bias=some",
    "lora.eva_config={}",
    "esft.score=luck",
    "esft.experts=absent.json",
    "esft.shared_experts=2",
    "losses.aux_loss_type=other",
    "training.optim=magic",
    "training.optim=[adamw_torch]",
    "training.lr_scheduler_type=zigzag",
    "training.report_to=wandb_or_so",
    "training.report_to=comet_ml",
    "training.report_to=[none, 3]",
    "training.eval_strategy=sometimes",
    "training.save_strategy=sometimes",
    "training.log_level=loud",
    "training.fp16=maybe",
    "training.deepspeed=absent.json",
    "training.output_dir=elsewhere",
    "training.hub_token=secret",
    "training.max_stepz=3",
    "lora.rank=3",
    "modle=x",
    "data=absent.jsonl",
    "data=/",
    "data=''",
    "model=absent-folder-x",
    "model=/",
    "output_dir={rows}",
    "output_dir=/proc/nowhere",
    "=3",
    "seed",
    "seed=",
    "seed=[",
    "seed={a: [}",
    "eval_fraction=0.999",
    "model=" + "m" * 300,
    "data=" + "d" * 300,
    "output_dir=" + "o" * 300,
    "output_dir=" + "/o" * 3000,
    "output_dir=~nobody-of-that-name/x",
)
FILES = {
    "deep lists": "model: " + "[" * 5000,
    "deep mappings": "model: " + "{a: " * 5000 + "1" + "}" * 5000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(2000)),
    "an alias bomb": "a: &a [x, x]\n"
    + "".join(f"{n}: &{n} [*{m}, *{m}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)),
    "a list in itself": "a: &a [*a]",
    "a merged mapping": "x: &x {seed: 1}\n<<: *x",
    "a Python object": "model: !!python/object/apply:os.system [ls]",
    "an unknown tag": "model: !mine x",
    "a number that is none": "seed: !!int word",
    "a truth value that is none": "merge: !!bool word",
    "a date that is none": "model: !!timestamp word",
    "a date of no calendar": "model: 2020-13-45",
    "a date": "model: 2020-01-02",
    "bytes": "model: !!binary AAAA",
    "a set": "model: !!set {a, b}",
    "too many digits": "seed: " + "9" * 5000,
    "a key twice": "seed: 1\nseed: 2",
    "a list for a key": "? [a]\n: 1",
    "a number for a key": "3: 4",
    "a long key": "k" * 100_000 + ": 1",
    "two documents": "seed: 1\n---\nseed: 2",
    "a tab": "seed:\t1\n\tmerge: true",
    "an open quote": "model: 'x",
    "nothing": "",
    "a comment": "# nothing",
    "a word": "lora_all",
    "a list": "- seed",
    "a null": "model:\ndata:\noutput_dir:",
    "NUL in a path": 'output_dir: "a\\0b"',
    "half a character": 'output_dir: "\\ud800"',
    "megabytes": "# " + "x" * 1_100_000,
}


def number_cases() -> Iterator[Case]:
    """Every number of the table of ranges, out of its range."""
    from modeling_deepseek_moe.finetune.recipe.ranges import RANGES

    for key, allowed in RANGES.items():
        nested = key in ("lora.rank_pattern", "lora.alpha_pattern")
        values = [value for value in EVERY_NUMBER if not (key.startswith("training.local") and value == "-1")]
        if not allowed.has(0):
            values.append("0")
        for value in values:
            if is_allowed(key, value):
                continue
            text = f"{{x: {value}}}" if nested else value
            yield _call(f"{key}={text}", says=f"`{key}`")


def is_allowed(key: str, value: str) -> bool:
    """What is out of no range: -1 leaves the number of steps open, and one word is a list of words, or a type."""
    return (key, value) in {("training.max_steps", "-1")} or (key, value) in _FITS


# Where a list, a word or a number of that size is what the other library takes.
_FITS = {
    ("lora.layers_to_transform", "[]"),
    ("lora.layer_replication", "[]"),
    ("lora.trainable_token_indices", "[]"),
    ("lora.alora_invocation_tokens", "[]"),
    ("dpo.loss_weights", "[]"),
}


def value_cases() -> Iterator[Case]:
    for assignment in VALUES:
        yield _call(assignment)


def file_cases() -> Iterator[Case]:
    """Recipes that are no recipes."""

    def writing(text):
        return lambda folder, places: (folder / "recipe.yaml").write_text(text, encoding="utf-8")

    for name, text in FILES.items():
        yield Case(name, ["finetune", "{folder}/recipe.yaml"], writing(text))
    yield Case(
        "binary", ["finetune", "{folder}/recipe.yaml"], lambda f, p: (f / "recipe.yaml").write_bytes(b"\xff\xfe\0")
    )
    yield Case("a folder", ["finetune", "{folder}"])
    yield Case("absent", ["finetune", "{folder}/recipe.yaml"])
    yield Case("a long name", ["finetune", "r" * 300])
    yield Case("a device", ["finetune", "/dev/zero"])
    yield Case("a pipe", ["finetune", "{folder}/pipe"], lambda folder, places: os.mkfifo(folder / "pipe"))
    yield Case("a socket", ["finetune", "{folder}/socket"], _socket)
    yield Case("none", ["finetune"])


def _socket(folder, places) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        before = os.getcwd()
        os.chdir(folder)  # its path may have no more than a hundred characters
        opened.bind("socket")
        os.chdir(before)


def _call(assignment: str, says: str = "") -> Case:
    key = assignment.partition("=")[0]
    needs = [need for need in SECTION_NEEDS.get(key.partition(".")[0], []) if not need.startswith(f"{key}=")]
    if key == "dpo.beta":
        needs = []
    arguments = ["finetune", "{folder}/recipe.yaml", *needs, assignment.replace("{rows}", "\0")]
    arguments = [a.replace("{", "{{").replace("}", "}}").replace("\0", "{rows}") if "=" in a else a for a in arguments]

    def prepare(folder, places):
        (folder / "recipe.yaml").write_text(RECIPE.format(**places), encoding="utf-8")

    return Case(assignment[:60], arguments, prepare, says=says)
