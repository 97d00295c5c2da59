"""Plain greedy decoding against `generate(use_mtp=True)`, by turns in one run.

    taskset -c 0 python tests/benchmarks/mtp_decoding.py --threads 1 --output results/mtp_decoding

Prompts are held-out documents of the demo's corpus, packed as in its pretraining and cut to a length: the last one is
library text that goes on, or a task whose answer is to come. Generation ends with the model's end token or after
`--new-tokens`. Times are those of the whole call, prompt included, divided by the new tokens.

Exits with 1 if any output differs from plain greedy's. In bfloat16 that can happen without a fault: a pass over two
tokens rounds differently from one over a single token, and two tokens can be equally likely.
"""

import argparse
import contextlib
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.mtp_generation import MultiTokenCandidateGenerator

sys.path.insert(0, str(Path(__file__).parents[2] / "model_cards/demo_base/scripts"))

from corpus import documents  # noqa: E402

TASK_SHARES = {"text": 0.0, "answers": 1.0}
COLUMNS = {
    "kind": "continues",
    "length": "prompt",
    "new_tokens": "new tokens",
    "acceptance": "accepted / drafted",
    "tokens_per_pass": "tokens a pass",
    "plain": "plain, ms a token",
    "mtp": "use_mtp, ms a token",
    "ratio": "plain / use_mtp",
    "cpu_ratio": "the same in CPU time",
    "drafting": "drafting, share of time",
    "identical": "identical",
}


def prompt(tokenizer: PreTrainedTokenizerBase, kind: str, length: int, seed: int, new_tokens: int) -> torch.Tensor:
    """`[1, length]` ids: documents, each `bos text eos`; the first or the last is cut."""
    ids: list[int] = []
    for document in documents(seed, TASK_SHARES[kind], held_out=True):
        head = tokenizer(tokenizer.bos_token + document.prompt, add_special_tokens=False)["input_ids"]
        body = tokenizer(document.completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        if kind == "answers" and len(head) > length:
            continue
        if kind == "answers" and len(ids) + len(head) >= length:
            return torch.tensor([(ids + head)[-length:]])
        if kind == "text" and len(ids) + len(head + body) >= length + new_tokens:
            return torch.tensor([(ids + head + body)[:length]])
        ids += head + body
    raise AssertionError("the stream of documents has no end")


class Drafting:
    """What the candidate generators did while `recorded`."""

    def __init__(self):
        self.passes = self.drafted = self.accepted = 0
        self.seconds = 0.0

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        generator = MultiTokenCandidateGenerator
        get_candidates, update = generator.get_candidates, generator.update_candidate_strategy

        def counted(generator, input_ids, **kwargs):
            begin = time.perf_counter()
            ids, logits = get_candidates(generator, input_ids, **kwargs)
            self.seconds += time.perf_counter() - begin
            self.passes += 1
            self.drafted += ids.shape[1] - input_ids.shape[1]
            return ids, logits

        def counted_update(generator, input_ids, scores, num_matches):
            self.accepted += int(num_matches)
            return update(generator, input_ids, scores, num_matches)

        generator.get_candidates, generator.update_candidate_strategy = counted, counted_update
        try:
            yield
        finally:
            generator.get_candidates, generator.update_candidate_strategy = get_candidates, update


def generated(model, ids: torch.Tensor, new_tokens: int, use_mtp: bool) -> tuple[list[int], float, float]:
    """New token ids, and the seconds of wall and of CPU time that they took."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=model.config.pad_token_id,
        use_mtp=use_mtp,
    )
    new = output[0, ids.shape[1] :].tolist()
    return new, time.perf_counter() - begin, time.process_time() - begin_cpu


def measure(model, prompts: list[torch.Tensor], new_tokens: int, repeats: int) -> dict[str, Any]:
    """Both ways over all prompts, by turns; every other time the other one begins."""
    drafting = Drafting()
    times: dict[str, list[float]] = {name: [] for name in ("plain", "mtp", "plain_cpu", "mtp_cpu")}
    lengths, identical, mtp_seconds = [], [], 0.0
    for repeat in range(repeats):
        for index, ids in enumerate(prompts):
            outputs = {}
            for use_mtp in (False, True) if (repeat + index) % 2 else (True, False):
                with drafting.recorded():
                    new, seconds, cpu = generated(model, ids, new_tokens, use_mtp)
                name = "mtp" if use_mtp else "plain"
                outputs[name] = new
                times[name].append(seconds / len(new) * 1e3)
                times[f"{name}_cpu"].append(cpu / len(new) * 1e3)
                mtp_seconds += seconds if use_mtp else 0.0
            lengths.append(len(outputs["mtp"]))
            identical.append(outputs["plain"] == outputs["mtp"])
    return {
        "new_tokens": statistics.fmean(lengths),
        "acceptance": drafting.accepted / drafting.drafted,
        "tokens_per_pass": sum(lengths) / drafting.passes,
        "plain": quartiles(times["plain"]),
        "mtp": quartiles(times["mtp"]),
        "ratio": quartiles([a / b for a, b in zip(times["plain"], times["mtp"], strict=True)]),
        "cpu_ratio": quartiles([a / b for a, b in zip(times["plain_cpu"], times["mtp_cpu"], strict=True)]),
        "drafting": drafting.seconds / mtp_seconds,
        "identical": [sum(identical), len(identical)],
    }


def quartiles(values: list[float]) -> list[float]:
    """Median, lower and upper quartile."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [median, lower, upper]


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return named[1] if named else platform.processor()


def environment(model, arguments: argparse.Namespace) -> dict[str, Any]:
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
    return {
        "model": arguments.model.name,
        "layers": f"{model.config.num_hidden_layers} + {model.config.num_nextn_predict_layers} MTP",
        "dtype": arguments.dtype,
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepseek-moe")},
        "commit": commit.stdout.strip() or "unknown",
        "prompts": arguments.prompts,
        "repeats": arguments.repeats,
    }


def cell(name: str, value: Any) -> str:
    if name == "identical":
        return "{} of {}".format(*value)
    if name in ("acceptance", "drafting"):
        return f"{value:.0%}"
    if isinstance(value, list):
        return "{:.2f} ({:.2f} to {:.2f})".format(*value)
    return f"{value:.2f}" if name == "tokens_per_pass" else f"{value:.0f}" if isinstance(value, float) else str(value)


def markdown(report: dict[str, Any]) -> str:
    """The table, with medians and quartiles, and the environment below it."""
    lines = [" | ".join(COLUMNS.values()), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(cell(name, row[name]) for name in COLUMNS) for row in report["rows"]]
    facts = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    return "\n".join(f"| {line} |" for line in lines) + f"\n\nMedian (quartiles). {facts}.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    shipped = Path(str(resources.files("modeling_deepseek_moe.model_cards") / "demo_base"))
    parser.add_argument("--model", type=Path, default=shipped, help="folder of a model with MTP modules")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 512], help="prompt lengths in tokens")
    parser.add_argument("--kinds", nargs="+", choices=TASK_SHARES, default=list(TASK_SHARES), help="what is continued")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=6, help="prompts of each kind and length")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = DeepseekMoeForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    model = model.to(arguments.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    report: dict[str, Any] = {"environment": environment(model, arguments), "rows": []}
    for kind in arguments.kinds:
        for length in arguments.lengths:
            prompts = [
                prompt(tokenizer, kind, length, seed, arguments.new_tokens).to(arguments.device)
                for seed in range(arguments.prompts)
            ]
            measure(model, prompts[:1], arguments.new_tokens, repeats=2)  # warm-up
            result = measure(model, prompts, arguments.new_tokens, arguments.repeats)
            report["rows"].append({"kind": kind, "length": length, **result})
            print(f"{kind}, {length} tokens: done", file=sys.stderr)
    print(markdown(report))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        arguments.output.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    return 0 if all(same == total for same, total in (row["identical"] for row in report["rows"])) else 1


if __name__ == "__main__":
    sys.exit(main())
