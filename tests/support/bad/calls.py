"""Calls of every verb that ask for what cannot be: numbers, words, files and folders."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from .trying import Case

CHAT = ["chat", "{base}"]
EVALUATE = ["evaluate", "{base}", "--output", "{folder}/out"]
EXPERTS = ["experts", "{base}", "{rows}", "--output", "{folder}/out"]
SCORE = ["esft", "score", "{base}", "{rows}", "--output", "{folder}/scores.json"]
SELECT = ["esft", "select", "{folder}/scores.json", "--output", "{folder}/cfg.json"]
CONVERT = ["convert", "{base}", "{folder}/out", "--to"]
PUSH = ["push", "{base}", "--to"]
PLAN = ["plan", "deepseek-v2-lite", "lora_all"]
LONG = "x" * 300
NUMBERS = ("0", "-1", "nan", "1e99", "word", "")
CALLS = [
    *([*CHAT, "--temperature", n] for n in ("0", "-1", "nan", "inf", "word")),
    *([*CHAT, "--top-p", n] for n in ("0", "-1", "2", "nan", "word")),
    *([*CHAT, "--max-new-tokens", n] for n in ("0", "-1", "1.5", "word")),
    *([*CHAT, "--seed", n] for n in ("-1", "100000000000000000000", "word")),
    [*CHAT, "--greedy", "--temperature", "1"],
    [*CHAT, "--dtype", "float8"],
    [*CHAT, "--adapter", "{folder}"],
    [*CHAT, "--adapter", "absent"],
    ["chat", "{folder}"],
    ["chat", "{rows}"],
    ["chat", "{folder}/absent"],
    ["chat", LONG],
    ["chat", "~nobody-of-that-name/x"],
    ["chat"],
    EVALUATE,
    *([*EVALUATE, "--text", "{text}", flag, n] for flag in ("--window", "--stride", "--batch-size") for n in NUMBERS),
    *([*EVALUATE, "--data", "{rows}", flag, n] for flag in ("--limit", "--max-new-tokens") for n in NUMBERS),
    [*EVALUATE, "--text", "{folder}"],
    [*EVALUATE, "--text", "{folder}/absent"],
    [*EVALUATE, "--text", "{binary}"],
    [*EVALUATE, "--text", "{empty}"],
    [*EVALUATE, "--text", LONG],
    [*EVALUATE, "--data", "{folder}"],
    [*EVALUATE, "--data", "{folder}/absent.jsonl"],
    [*EVALUATE, "--data", "{empty}"],
    [*EVALUATE, "--data", "{binary}"],
    [*EVALUATE, "--data", LONG],
    [*EVALUATE, "--metric", "exact_match"],
    [*EVALUATE, "--data", "{rows}", "--metric", "./absent.py"],
    [*EVALUATE, "--data", "{rows}", "--metric", LONG],
    [*EVALUATE, "--tasks", "{folder}/absent.yaml"],
    ["evaluate", "{base}", "--text", "{text}", "--output", "{rows}"],
    ["evaluate", "{base}", "--text", "{text}", "--output", "/proc/nowhere"],
    ["evaluate", "{base}", "--text", "{text}", "--output", "{folder}/" + LONG],
    ["evaluate", "{base}", "--text", "{text}", "--output", "~nobody-of-that-name/x"],
    [*EVALUATE, "--text", "{text}", "--before", "{folder}"],
    [*EVALUATE, "--text", "{text}", "--dtype", "int8"],
    *([*EXPERTS, flag, n] for flag in ("--rows", "--max-length", "--batch-size") for n in NUMBERS),
    [*EXPERTS, "--compare", "{folder}/absent.jsonl"],
    [*EXPERTS, "--adapter", "{folder}"],
    [*EXPERTS, "--dtype", "int8"],
    ["experts", "{base}", "{empty}", "--output", "{folder}/out"],
    ["experts", "{base}", "{folder}/absent.jsonl", "--output", "{folder}/out"],
    ["experts", "{base}", "{rows}", "--output", "{rows}"],
    ["experts", "{base}", "{rows}", "--output", "/proc/nowhere"],
    ["experts", "{base}", "{rows}", "--output", "{folder}/" + LONG],
    ["experts", "{folder}", "{rows}", "--output", "{folder}/out"],
    *([*SCORE, flag, n] for flag in ("--sample-tokens", "--max-length", "--batch-size") for n in NUMBERS),
    [*SCORE, "--dtype", "int8"],
    ["esft", "score", "{base}", "{empty}", "--output", "{folder}/scores.json"],
    ["esft", "score", "{base}", "{rows}", "--output", "{rows}"],
    ["esft", "score", "{base}", "{rows}", "--output", "{folder}"],
    ["esft", "score", "{base}", "{rows}", "--output", "{folder}/none/scores.json"],
    ["esft", "score", "{base}", "{rows}", "--output", "{folder}/" + LONG],
    [*CONVERT, "bf17"],
    [*CONVERT, ""],
    [*CONVERT, "bf16", "--dtype", "float8"],
    [*CONVERT, "bf16", "--dtype", "float32"],
    [*CONVERT, "bf16", "--mp", "2"],
    [*CONVERT, "bf16", "--from", "somewhere"],
    [*CONVERT, "bf16", "--adapter", "{folder}"],
    [*CONVERT, "bf16", "--adapter", "{folder}/absent"],
    [*CONVERT, "bf16", "--only", "q_proj"],
    [*CONVERT, "bf16", "--kv-b-proj", "keep"],
    [*CONVERT, "bf16", "--experts", "4"],
    [*CONVERT, "bf16", "--data", "{rows}"],
    [*CONVERT, "esft"],
    [*CONVERT, "esft", "--base", "{base}"],
    [*CONVERT, "esft", "--base", "{folder}/absent"],
    [*CONVERT, "peft"],
    [*CONVERT, "deepseek"],
    [*CONVERT, "upcycle"],
    *([*CONVERT, "deepseek-inference", "--mp", n] for n in ("0", "-1", "3", "7", "word")),
    ["convert", "{base}", "{base}", "--to", "bf16"],
    ["convert", "{base}", "{base}/inside", "--to", "bf16"],
    ["convert", "{base}", "{rows}", "--to", "bf16"],
    ["convert", "{base}", "{folder}/" + LONG, "--to", "bf16"],
    ["convert", "{base}", "/proc/nowhere", "--to", "bf16"],
    ["convert", "{folder}", "{folder}/out", "--to", "bf16"],
    ["convert", "{folder}/absent", "{folder}/out", "--to", "bf16"],
    ["convert", "{rows}", "{folder}/out", "--to", "bf16"],
    ["convert", LONG, "{folder}/out", "--to", "bf16"],
    *(["push", "{base}", "--to", name] for name in ("", "me", "/", "me/", "../x", "me/a b", "a/b/c", "me/" + LONG)),
    [*PUSH, "me/x", "--native", "llama"],
    [*PUSH, "me/x", "--adapter-only"],
    [*PUSH, "me/x", "--adapter-only", "--merged"],
    [*PUSH, "me/x", "--license", "my own"],
    ["push", "{folder}", "--to", "me/x"],
    ["push", "{folder}/absent", "--to", "me/x"],
    ["push", "{rows}", "--to", "me/x"],
    ["push", LONG, "--to", "me/x"],
    *([*PLAN, "--gpu-memory", memory] for memory in ("0GB", "-1GB", "24", "nanGB", "much", "1e999GB", "")),
    *([*PLAN, "--gpus", n] for n in ("0", "-1", "word")),
    *([*PLAN, assignment] for assignment in ("seed=-1", "max_length=0", "x=1", "lora.r=0", "training.max_steps=0")),
    ["plan", "deepseek-v2-light", "lora_all"],
    ["plan", "{folder}", "lora_all"],
    ["plan", "{rows}", "lora_all"],
    ["plan", LONG, "lora_all"],
    ["plan", "deepseek-v2-lite", "lora_most"],
    ["plan", "deepseek-v2-lite", LONG],
    ["plan", "deepseek-v2-lite"],
    ["no-such-verb"],
]
SCORES = {"token_scores": {"1": {"0": 0.75, "1": 0.25}}, "gate_scores": {"1": {"0": 0.75, "1": 0.25}}}
SCORE_FILES = {
    "empty": "",
    "a list": "[]",
    "cut off": '{"token_scores": {',
    "nothing in it": "{}",
    "deep": "[" * 100_000,
    "NaN": json.dumps({**SCORES, "token_scores": {"1": {"0": float("nan")}}}),
    "negative": json.dumps({**SCORES, "token_scores": {"1": {"0": -1.0}}}),
    "a word": json.dumps({**SCORES, "token_scores": {"1": {"0": "much"}}}),
    "a layer that is none": json.dumps({**SCORES, "token_scores": {"first": {"0": 1.0}}}),
    "an expert that is none": json.dumps({**SCORES, "token_scores": {"1": {"first": 1.0}}}),
    "a list of layers": json.dumps({**SCORES, "token_scores": [1]}),
    "too little": json.dumps({**SCORES, "token_scores": {"1": {"0": 0.01}}}),
}


def call_cases() -> Iterator[Case]:
    """Arguments that do not fit the verb, or each other."""
    for call in CALLS:
        shown = [argument for argument in call[1:] if not argument.startswith("{base}")]
        yield Case(f"{call[0]} {' '.join(shown)}"[:100], call)


def score_cases() -> Iterator[Case]:
    """What `esft select` is given."""

    def writing(text):
        return lambda folder, places: (folder / "scores.json").write_text(text, encoding="utf-8")

    for name, text in SCORE_FILES.items():
        yield Case(f"scores: {name}", SELECT, writing(text))
    sound = json.dumps(SCORES)
    for value in ("0", "-1", "2", "nan", "word"):
        yield Case(f"top_p {value}", [*SELECT, "--top-p", value], writing(sound))
    yield Case("an unknown score", [*SELECT, "--score", "luck"], writing(sound))
    yield Case("no scores", SELECT)
    yield Case("output over the scores", ["esft", "select", "{folder}/s", "--output", "{folder}/s"], _one_file)
    yield Case("output a folder", [*SELECT[:-1], "{folder}"], writing(sound))


def _one_file(folder, places) -> None:
    (folder / "s").write_text(json.dumps(SCORES), encoding="utf-8")


def more_places(root: Path) -> dict[str, Path]:
    """Files that calls name."""
    (root / "text.txt").write_text(" ".join(f"w{i % 80}" for i in range(200)), encoding="utf-8")
    (root / "empty.jsonl").write_text("", encoding="utf-8")
    (root / "binary.jsonl").write_bytes(os.urandom(64) + b"\xff\xfe\n")
    return {"text": root / "text.txt", "empty": root / "empty.jsonl", "binary": root / "binary.jsonl"}
