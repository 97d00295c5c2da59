"""Pretrain the demo's base model on two processes of one thread each (or in one process, slower):

    torchrun --nproc-per-node 2 model_cards/demo_base/scripts/pretrain.py --output DIR

A DeepSeek-V3 in small: MLA with compressed queries, one dense layer, then routed and shared experts under sigmoid
routing, whose selection bias moves once per optimizer step (DeepSeek-V3, section 2.1.2), and one multi-token
prediction layer. `pretrain.yaml` holds every number; `corpus.py` is what it reads.
"""

import argparse
import functools
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from corpus import documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.finetune.data.rows import IGNORED
from modeling_deepseek_moe.finetune.demo.task import ASSISTANT, USER
from modeling_deepseek_moe.finetune.experts.watch import watch_experts
from modeling_deepseek_moe.finetune.files import write_text
from modeling_deepseek_moe.finetune.model.balance import BalanceExperts

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, USER, ASSISTANT]
# A word with its leading space, one digit, a run of anything else, or a run of white space.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '" + ASSISTANT + "' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role'] + ': use user or assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def build_tokenizer(vocab_size: int, sample_documents: int, seed: int) -> PreTrainedTokenizerFast:
    """Bytes plus the corpus' commonest words: a common word is one token, any other is spelled letter by letter.

    Digits always stand alone. A BPE with no merges at all (`ignore_merges` looks the whole word up first), so that
    tasks about letters and digits see letters and digits.
    """
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts: Counter[str] = Counter()
    for document in itertools.islice(documents(seed), sample_documents):
        for text in (document.prompt.removeprefix(USER).removesuffix(ASSISTANT), document.completion):
            counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(text) if len(word) > 1)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    common = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - len(SPECIAL_TOKENS) - len(alphabet)]
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS + alphabet + common)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


class PackedRows(Dataset):
    """Row `i` is `length` tokens of documents from the stream with seed `i`: no state, no storage.

    A document is `bos prompt completion eos`; prompts, which are mostly random, are read but not learned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int, rows: int, task_share: float, held_out: bool):
        self.tokenizer, self.length, self.rows = tokenizer, length, rows
        self.task_share, self.held_out = task_share, held_out

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if not 0 <= row < self.rows:
            raise IndexError(f"row={row} is outside of this set of {self.rows} rows")
        tokens: list[int] = []
        labels: list[int] = []
        for document in documents(row, self.task_share, self.held_out):
            prompt, rest = (
                self.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (BOS + document.prompt, document.completion + EOS)
            )
            tokens += prompt + rest
            labels += [IGNORED] * len(prompt) + rest
            if len(tokens) >= self.length:
                break
        return {"input_ids": torch.tensor(tokens[: self.length]), "labels": torch.tensor(labels[: self.length])}


def read_recipe(balance: str | None = None) -> dict[str, Any]:
    """The numbers of the run, `pretrain.yaml`; `balance` names another of its ways to balance experts."""
    recipe = yaml.safe_load(Path(__file__).with_name("pretrain.yaml").read_text(encoding="utf-8"))
    return recipe | {"balance": balance or recipe["balance"]}


def pretrain(output: Path, recipe: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train the base from random weights and save model, tokenizer, `training_log.json` and `loss.png` in `output`.

    Checkpoints go to `output/checkpoints`; a second call with the same folder goes on from the last of them.
    """
    recipe = recipe or read_recipe()
    data, seed = recipe["data"], recipe["training"]["seed"]
    tokenizer = build_tokenizer(recipe["model"]["vocab_size"], data["tokenizer_documents"], seed)
    set_seed(seed)
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        report_to=[],
        **recipe["training"],
    )
    arguments.per_device_train_batch_size = data["batch_size"] // arguments.world_size
    rows = arguments.max_steps * data["batch_size"]
    checkpoint = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    balance = dict(recipe["balances"][recipe["balance"]])
    speed = balance.pop("bias_update_speed")
    model = DeepseekMoeForCausalLM(_config(recipe["model"] | balance, tokenizer))
    packed = functools.partial(PackedRows, tokenizer, data["length"], task_share=data["task_share"])
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=packed(rows=rows, held_out=False),
        eval_dataset=packed(rows=data["validation_rows"], held_out=True),
        callbacks=[BalanceExperts(model, speed)] if speed else [],
    )
    watch_experts(trainer, output)
    trainer.train(resume_from_checkpoint=checkpoint)
    history = trainer.state.log_history
    log = {
        "balance": recipe["balance"],
        "seed": seed,
        "tokens": rows * data["length"],
        "parameters": model.num_parameters(),
        "history": history,
    }
    if not trainer.is_world_process_zero():
        return log
    model.config.use_cache = True  # the Trainer turned it off
    model.config.mtp_loss_weight = 0.0  # as in released checkpoints: who trains the module further says so
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    write_text(output / "training_log.json", json.dumps(log, indent=1) + "\n")
    draw(history, output / "loss.png")
    return log


def _config(fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> DeepseekMoeConfig:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return DeepseekMoeConfig(**fields, **{name: getattr(tokenizer, name) for name in names})


def draw(history: list[dict[str, Any]], path: Path) -> None:
    """Draw losses and MaxVio over optimizer steps into a PNG file, from the Trainer's `log_history`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, balance = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for axes, key, style, label in (
        (losses, "loss", "-", "training (with the multi-token loss)"),
        (losses, "eval_loss", "o--", "validation (next token)"),
        (balance, "max_violation", "-", "MaxVio, mean of layers"),
    ):
        points = [(row["step"], row[key]) for row in history if key in row]
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)
        axes.grid(alpha=0.3)
        axes.legend()
    losses.set(ylabel="loss (nats a token)")
    balance.set(xlabel="optimizer step", ylabel="(max - mean) / mean load", ylim=(0, None))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description="Pretrain the demo's base model from random weights.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model, its log and its checkpoints")
    parser.add_argument("--balance", choices=read_recipe()["balances"], help="how experts are kept evenly used")
    arguments = parser.parse_args()
    log = pretrain(arguments.output, read_recipe(arguments.balance))
    print(f"{log['parameters']:,} parameters, {log['tokens']:,} tokens")


if __name__ == "__main__":
    main()
