"""What a recipe is: one frozen dataclass for all of a run's settings, and one for its `esft` section."""

from dataclasses import dataclass, field
from typing import Any, Literal

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """One fine-tuning run.

    Attributes:
        model: local folder or Hub name of the model to start from.
        data: training rows: a local file (JSONL, a JSON array, CSV, Parquet) or a folder of such, or the Hub name of a
            data set (`data/rows.py` says which rows).
        output_dir: folder for checkpoints and results; the same recipe run again resumes in it.
        eval_data: rows to measure the loss on; without it, `eval_fraction` of the training rows is held out.
        eval_fraction: share of `data` to hold out, 0 for none.
        data_split, eval_split: which split of a folder or a Hub data set.
        max_length: longer rows are cut to this many tokens, or what `long_rows` says.
        long_rows: what to do with rows longer than that: cut, split (`text` goes on in further rows), skip or stop.
        bad_rows: what to do with a row that cannot be read: stop or skip; skipped ones are counted and shown.
        split_special_tokens: control tokens that stand in the text of a row (`<｜User｜>`, EOS) are text, as for a
            tokenizer; false makes them what they are called, for rows that a chat template was put into already.
        packing: put several training rows into one sequence of `max_length` tokens, none of which sees another.
        streaming: read the rows while training instead of before; needs `eval_data` and `training.max_steps`.
        dtype: type of the weights in memory: auto (as stored), float32, bfloat16 or float16.
        text_only: of a model of several parts (Kimi-K2.5 also sees) take the text part alone; else it is refused.
        trust_remote_code: run the code of a tokenizer that is code; that of a model is never run.
        quantization: keep the frozen weights in four bits: nf4; None for not.
        attn_implementation, experts_implementation: kernels by their transformers names; None for the model's default.
        gradient_checkpointing: compute activations twice to keep fewer.
        bias_update_speed: step of the router's balancing bias after every optimizer step; 0 freezes it.
        watch: count the tokens of every expert: numbers in the log, `experts.png` and `experts.json`.
        metric: judges answers to held-out rows, before and after: exact_match, json_match, the path of a script for
            `evaluate`, or a Hub name; None for not.
        metric_rows: the most held-out rows that the metric judges.
        seed: what everything random is drawn from.
        global_batch_size: rows of one optimizer step in all processes together, from which the steps of gradient
            accumulation follow; None for what `training.*` comes to.
        merge: also save the model with the adapters merged into its weights.
        overwrite: empty an `output_dir` that holds another run.
        hub_id, hub_private: push the result to this Hub repository.
        losses: fields of the model's config that weigh its balance and multi-token losses, where they should differ
            from the model's own: `aux_loss_alpha`, `mtp_loss_weight` and others (`DeepseekMoeConfig` explains them).
        lora: `targets` (words) and options of `peft.LoraConfig`; empty for full fine-tuning.
        esft: train only the experts that serve the data most (`EsftOptions`); empty for not.
        parallel: spread the model over processes by transformers' `DistributedConfig` (`ParallelOptions`); empty for
            not.
        dpo: learn from preferences (`prompt`, `chosen`, `rejected`): options of `trl.DPOConfig`; empty for not.
        training: options of `transformers.TrainingArguments`.
    """

    model: str
    data: str
    output_dir: str
    eval_data: str | None = None
    eval_fraction: float = 0.05
    data_split: str = "train"
    eval_split: str = "test"
    max_length: int = 2048
    long_rows: Literal["cut", "split", "skip", "stop"] = "cut"
    bad_rows: Literal["stop", "skip"] = "stop"
    split_special_tokens: bool = True
    packing: bool = False
    streaming: bool = False
    text_only: bool = False
    trust_remote_code: bool = False
    dtype: str = "auto"
    quantization: Literal["nf4"] | None = None
    attn_implementation: str | None = None
    experts_implementation: str | None = None
    gradient_checkpointing: bool = False
    bias_update_speed: float = 0.0
    watch: bool = True
    metric: str | None = None
    metric_rows: int = 200
    seed: int = 42
    global_batch_size: int | None = None
    merge: bool = False
    overwrite: bool = False
    hub_id: str | None = None
    hub_private: bool = True
    losses: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    esft: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


# The paper's shares of scores, found with 64 routed experts a layer (FACTS 5.1).
PAPERS_TOP_P = {"token": 0.2, "gate": 0.1}


@dataclass(frozen=True)
class EsftOptions:
    """Which routed experts expert-specialized fine-tuning trains (ESFT, arXiv 2407.01906).

    Attributes:
        score: token, the share of the tokens that an expert serves, or gate, its mean gate value.
        top_p: per layer, the fewest experts whose scores sum up to this; None for the paper's, 0.2 for token and 0.1
            for gate.
        sample_tokens: how many tokens of the training rows are scored.
        experts: an `expert_cfg.json` that was chosen before; then nothing is scored.
        shared_experts, non_expert_modules: train these as well.
    """

    score: Literal["token", "gate"] = "token"
    top_p: float | None = None
    sample_tokens: int = 131_072
    experts: str | None = None
    shared_experts: bool = False
    non_expert_modules: bool = False

    @property
    def share(self) -> float:
        """`top_p`, or the paper's for this score."""
        return PAPERS_TOP_P[self.score] if self.top_p is None else self.top_p


@dataclass(frozen=True)
class ParallelOptions:
    """How the processes of a run share a model that is read in parts; `shard x replicate x tp` are all of them.

    Attributes:
        shard: processes that cut up every weight among them (FSDP), each with rows of its own; auto for as many as
            there are.
        replicate: copies of the model that is cut up so, each with rows of its own (HSDP).
        ep: processes that have different routed experts (expert parallelism); of those of `shard` and `tp`.
        tp: processes that compute every product together on the same rows (tensor parallelism).
    """

    shard: Literal["auto"] | int = "auto"
    replicate: int = 1
    ep: int = 1
    tp: int = 1
