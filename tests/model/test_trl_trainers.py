"""TRL's trainers on this class: the steps that they take on transformers' own, and balance losses in the objective.

Steps on the same weights differ by float32 roundings of the two classes, 1e-6 of a gradient, which three steps of
plain descent carry on: 2e-5.
"""

from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_config, tiny_model
from tiny_run import tiny_tokenizer
from transformers import (
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    Trainer,
    TrainerCallback,
    set_seed,
)

from modeling_deepseek_moe import DeepseekMoeForCausalLM, DeepseekMoeForSequenceClassification

trl = pytest.importorskip("trl")

TOLERANCE = 2e-5
ALPHA = 0.5
MICRO_BATCHES = 2
OURS = {"lm": DeepseekMoeForCausalLM, "reward": DeepseekMoeForSequenceClassification}
THEIRS = {"lm": DeepseekV3ForCausalLM, "reward": DeepseekV3ForSequenceClassification}


def words(start: int, count: int) -> str:
    return " ".join(f"w{(start + 3 * i) % 70}" for i in range(count))


def distinct_words(completions, **_) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


PAIRS = [{"prompt": words(i, 3), "chosen": f" {words(i + 1, 4)}", "rejected": f" w{i} w{i}"} for i in range(12)]
WHOLE = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in PAIRS]
SAMPLES = {"num_generations": 2, "max_completion_length": 5}
TRAINERS = {
    "SFT": ("lm", [{"text": words(i, 4 + i % 3)} for i in range(12)], {}),
    "DPO": ("lm", PAIRS, {}),
    "GRPO": ("lm", [{"prompt": words(i, 3)} for i in range(12)], SAMPLES),
    "Reward": ("reward", WHOLE, {}),
}


class Keep(TrainerCallback):
    """Gradients before each step of the optimizer, and what the base model got in passes with gradients."""

    def __init__(self, model):
        self.steps: list[dict[str, torch.Tensor]] = []
        self.seen: list[dict[str, torch.Tensor]] = []
        model.base_model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, base, args, kwargs) -> None:
        if base.training and torch.is_grad_enabled():
            ids = args[0] if args else kwargs["input_ids"]
            self.seen.append({"input_ids": ids, "attention_mask": kwargs["attention_mask"]})

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def train(model, kind: str, folder, **options: Any) -> tuple[Trainer, Keep]:
    """Steps of plain descent, each of two micro-batches of two rows."""
    _, rows, own = TRAINERS[kind]
    keep, peft_config = Keep(model), options.pop("peft_config", None)
    defaults = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    defaults |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": MICRO_BATCHES, "logging_steps": 1}
    defaults |= {
        "gradient_checkpointing": False,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
    }
    arguments = {"output_dir": str(folder), "max_steps": 3, "max_grad_norm": 0.0, **defaults, **own, **options}
    set_seed(0)  # of the samples that GRPO draws, and of adapters
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=[keep],
        **({"reward_funcs": distinct_words} if kind == "GRPO" else {}),
    )
    trainer.train()
    return trainer, keep


class Runs(NamedTuple):
    """Of one kind of trainer, all on the same weights; each a Trainer and what was kept."""

    load: Any  # this class's model as it was, given an `aux_loss_alpha`
    plain: tuple[Trainer, Keep]
    balanced: tuple[Trainer, Keep]
    native: tuple[Trainer, Keep]


@pytest.fixture(scope="module", params=TRAINERS)
def runs(request, tmp_path_factory) -> Runs:
    head = TRAINERS[request.param][0]
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_config("v3", pad_token_id=2, num_labels=1, num_nextn_predict_layers=0)
    tiny_model(config, model_class=OURS[head]).save_pretrained(folder)

    def load(alpha):
        return OURS[head].from_pretrained(folder, dtype=torch.float32, aux_loss_alpha=alpha)

    models = load(0.0), load(ALPHA), THEIRS[head].from_pretrained(folder, dtype=torch.float32)
    return Runs(load, *(train(model, request.param, folder) for model in models))


def test_three_steps_are_those_on_transformers_own_class(runs):
    losses, weights = [], []
    for trainer, keep in (runs.plain, runs.native):
        assert len(keep.steps) == 3 and len(keep.seen) == 3 * MICRO_BATCHES
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        weights.append(trainer.model.state_dict())
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
    assert any(gradient.abs().max() > 1e-2 for gradient in runs.plain[1].steps[-1].values())
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_contain_the_balance_losses(runs):
    """What the first step has more than without them is the gradient of the mean one of its micro-batches."""
    (_, plain), (_, balanced) = runs.plain, runs.balanced
    assert len(balanced.steps) == 3
    model = runs.load(ALPHA).train()
    for batch in balanced.seen[:MICRO_BATCHES]:
        losses = []
        model.base_model(**batch, aux_losses=losses)
        (losses[0] / MICRO_BATCHES).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected["model.layers.1.mlp.gate.weight"].abs().max() > 1e-2
    for name, gradient in expected.items():
        bound = TOLERANCE * max(1.0, plain.steps[0][name].abs().max().item())
        torch.testing.assert_close(balanced.steps[0][name] - plain.steps[0][name], gradient, atol=bound, rtol=0)


@pytest.mark.parametrize("kind", ["DPO", *(pytest.param(k, marks=pytest.mark.slow) for k in TRAINERS if k != "DPO")])
def test_adapters_learn_from_the_balance_losses(kind, tmp_path):
    config = tiny_config("v3", pad_token_id=2, num_labels=1, num_nextn_predict_layers=0)
    found = []
    for alpha in (0.0, ALPHA):
        model = tiny_model(config, model_class=OURS[TRAINERS[kind][0]])
        model.config.aux_loss_alpha = alpha
        adapters = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
        _, keep = train(model, kind, tmp_path, max_steps=1, peft_config=adapters)
        found.append({name: gradient for name, gradient in keep.steps[0].items() if "lora" in name})
    # The last layer's attention is in front of its router.
    assert len(found[0]) == 6 and all((found[1][name] - found[0][name]).abs().max() > 1e-4 for name in found[0])


def test_trl_is_told_at_once_that_its_objective_has_no_multi_token_loss():
    model = tiny_model(tiny_config("v3", mtp_loss_weight=0.3))
    with pytest.warns(UserWarning, match="mtp_loss_weight=0.3 has no part in this training"):
        model.add_model_tags(["trl", "sft"])
