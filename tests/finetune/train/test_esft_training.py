"""Training of chosen experts: gradients as in full fine-tuning, nothing else touched, resumed and loaded back."""

import json
import logging

import pytest
import torch
from checkpoint_folders import assert_bit_equal, tensors_of
from tiny import tiny_config, tiny_ids, tiny_model
from tiny_run import full, stopped_at, tiny_base, tiny_values

from modeling_deepseek_moe import CheckpointError, DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion.one_conversion import convert
from modeling_deepseek_moe.experts import DeepseekMoeExperts
from modeling_deepseek_moe.finetune.errors import RecipeError, UserError
from modeling_deepseek_moe.finetune.model.chosen_experts import ChosenExperts, release, train_chosen
from modeling_deepseek_moe.finetune.model.counting import blocks_of
from modeling_deepseek_moe.finetune.model.esft_adapter import load_esft_adapter, save_esft_adapter
from modeling_deepseek_moe.finetune.model.use import put_adapter
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train
from modeling_deepseek_moe.kernels.sorted import rows as sorted_rows

CHOSEN = {"1": [6, 0, 3], "2": [1]}
EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
NAMES, PARTS = ("gate_up", "down"), ("gate", "up", "down")


def choice(experts=CHOSEN, shared_experts=False, non_expert_modules=False) -> dict:
    return {"experts": experts, "shared_experts": shared_experts, "non_expert_modules": non_expert_modules}


def make_experts(dtype=torch.float32) -> DeepseekMoeExperts:
    experts = DeepseekMoeExperts(tiny_config("v3"))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts.to(dtype)


@pytest.fixture(params=["one expert after the other", "all at once"])
def every_way(request, monkeypatch):
    """The kernel's two ways, the second of which is CUDA's."""
    if request.param == "all at once":
        monkeypatch.setattr(sorted_rows, "grouped", lambda device: True)


@pytest.mark.parametrize("chosen", [[6, 0, 3], [5], list(range(7, -1, -1))], ids=str)
def test_chosen_experts_compute_and_learn_as_in_full_fine_tuning(every_way, chosen):
    """Some rows are another rank's, and no token chooses expert 5."""
    torch.manual_seed(0)
    reference = make_experts()
    experts = make_experts()
    experts.load_state_dict(reference.state_dict())
    index = torch.rand(20, 9).topk(3).indices
    index[index == 5] = 8
    results = []
    for module in (reference, ChosenExperts(experts, chosen)):
        torch.manual_seed(1)
        x, w = torch.randn(20, 32, requires_grad=True), torch.rand(20, 3, requires_grad=True)
        output = module(x, index, w)
        (output * torch.randn(20, 32)).sum().backward()
        results.append([output, x.grad, w.grad])
    # Sums of 3 experts and 32 or 16 products in another order; values of about 1.
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)
    for name in NAMES:
        found, expected = getattr(module, name).grad, getattr(reference, f"{name}_proj").grad[chosen]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert getattr(experts, f"{name}_proj").grad is None
    module.released()
    assert_bit_equal(experts.state_dict(), reference.state_dict())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("lineage", ["v2_lite", "v3"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_gradients_of_a_model_are_those_of_full_fine_tuning(lineage, checkpointing):
    reference = tiny_model(tiny_config(lineage, experts_implementation="eager"))
    model = tiny_model(tiny_config(lineage))
    train_chosen(model, choice())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tiny_ids(model.config)
    losses = []
    for one in (reference, model):
        loss = one.train()(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for layer, block in blocks_of(model).items():
        if layer > 2:
            continue
        for name in NAMES:
            expected = getattr(blocks_of(reference)[layer].experts, f"{name}_proj").grad[CHOSEN[str(layer)]]
            # Two orders of summation through three layers of float32.
            torch.testing.assert_close(getattr(block.experts, name).grad, expected, atol=1e-6, rtol=1e-3)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"model.layers.{i}.mlp.experts.{n}" for i in (1, 2) for n in NAMES]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
def test_a_step_shows_in_the_next_forward_pass_and_nowhere_else(options):
    """In training and after it, with and without gradients; decay moves no expert that was not chosen."""
    torch.manual_seed(0)
    module = ChosenExperts(make_experts(), [6, 0])
    frozen = [stack[2:].clone() for stack in module.experts.parameters()]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5, **options)
    x, index, w = torch.randn(4, 32), torch.tensor([[6, 0, 1]]).expand(4, 3), torch.rand(4, 3)
    outputs = [module(x, index, w)]
    for evaluate_before_step in (False, True):
        outputs[-1].sum().backward()
        if evaluate_before_step:
            with torch.no_grad():
                assert torch.equal(module(x, index, w), outputs[-1])
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode():
            evaluated = module(x, index, w)
        outputs.append(module(x, index, w))
        assert torch.equal(evaluated, outputs[-1])
        assert not torch.allclose(outputs[-1], outputs[-2], atol=1e-2)
    assert sum(len(state) and state["exp_avg"].numel() for state in optimizer.state.values()) == 2 * 3 * 16 * 32
    for stack, before in zip(module.experts.parameters(), frozen, strict=True):
        assert torch.equal(stack[2:], before)


def test_steps_too_small_for_bfloat16_add_up():
    module = ChosenExperts(make_experts(torch.bfloat16), [4])
    before = module.experts.gate_up_proj.detach()[0].clone()
    assert (module.gate_up.dtype, module.experts.gate_up_proj.dtype) == (torch.float32, torch.bfloat16)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-5)
    x, index, w = torch.randn(4, 32).bfloat16(), torch.full((4, 1), 4), torch.rand(4, 1)
    module(x, index, w).sum().backward()
    module.gate_up.grad.fill_(1.0)
    for _ in range(1000):
        optimizer.step()
    module.refresh()
    # bfloat16 rounds weights of about 0.2 to 2^-11.
    moved = before.float() - module.experts.gate_up_proj[0].float()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), atol=2e-3, rtol=0)


@pytest.fixture
def go(tmp_path, base):
    """Run an ESFT recipe of a few steps, with keys set differently."""

    def go(folder="a", **overrides):
        (tmp_path / folder).mkdir(exist_ok=True)
        values = full(tiny_values(tmp_path / folder, base, **{"training.weight_decay": 0.1}))
        esft = {} if any(key.startswith("esft") for key in overrides) else {"esft.top_p": 0.4}
        return train.run(make_recipe({**values, **esft, **overrides}))

    return go


def given(tmp_path, **options) -> dict[str, str]:
    (tmp_path / "given.json").write_text(json.dumps(choice(**options)))
    return {"esft.experts": str(tmp_path / "given.json")}


@pytest.mark.parametrize("lineage", ["v2_lite", "v3"])
def test_a_run_scores_trains_and_saves_the_chosen_experts_alone(go, tmp_path, lineage, capsys):
    base = tiny_base(tmp_path / "base", lineage)
    summary = go(merge=True, model=str(base))
    run = tmp_path / "a" / "run"
    chosen = json.loads((run / "expert_cfg.json").read_text())
    assert list(json.loads((run / "expert_scores.json").read_text())) == ["token_scores", "gate_scores"]
    count = sum(len(experts) for experts in chosen["experts"].values())
    assert 2 <= count <= 8 and set(chosen["experts"]) == {"1", "2"}
    assert (summary["trained_experts"], summary["trainable_parameters"]) == (count, count * 3 * 16 * 32)
    assert f"{count} routed experts" in capsys.readouterr().out
    assert summary["eval_loss_after"] < summary["eval_loss_before"]

    before, after, adapter = tensors_of(base), tensors_of(run / "model"), tensors_of(run / "adapter")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    names = {EXPERT.format(i, e, part) for i, es in chosen["experts"].items() for e in es for part in PARTS}
    assert changed == names == adapter.keys()
    assert_bit_equal(adapter, {name: after[name] for name in names})

    state = torch.load(run / "checkpoint-6" / "optimizer.pt")["state"]
    assert sum(one["exp_avg"].numel() for one in state.values()) == count * 3 * 16 * 32
    kept = tensors_of(run / "checkpoint-6")
    assert sum(t.numel() for name, t in kept.items() if "bias" not in name) == count * 3 * 16 * 32


@pytest.mark.parametrize(
    "parts",
    [{"shared_experts": True}, {"experts": {"2": [5, 2], "1": []}, "non_expert_modules": True}],
    ids=["shared experts too", "what is no expert too"],
)
def test_an_adapter_put_on_the_base_is_the_merged_model(go, tmp_path, base, parts):
    summary = go(merge=True, **given(tmp_path, **parts))
    merged = tensors_of(tmp_path / "a" / "run" / "model")
    changed = {name for name, tensor in tensors_of(base).items() if not torch.equal(tensor, merged[name])}
    for part, name in (("shared_experts", ".shared_experts."), ("non_expert_modules", ".self_attn.")):
        assert any(name in other for other in changed) == parts.get(part, False)
    assert any(".1.mlp.experts." in name for name in changed) == ("experts" not in parts)

    convert(base, tmp_path / "converted", "plain", adapter=summary["saved_adapter"])
    assert_bit_equal(tensors_of(tmp_path / "converted"), merged)
    model = put_adapter(DeepseekMoeForCausalLM.from_pretrained(base), summary["saved_adapter"])
    expected = DeepseekMoeForCausalLM.from_pretrained(summary["saved_model"])
    ids = tiny_ids(model.config)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_an_interrupted_run_ends_as_if_it_had_not_been(go, tmp_path, monkeypatch, caplog):
    """The best checkpoint is taken at the end; the routers' biases, which move, are in the checkpoints as well."""
    best = {"training.load_best_model_at_end": True, "training.eval_strategy": "steps", "training.eval_steps": 2}
    best |= {"bias_update_speed": 0.01, "merge": True}
    at_once = go("a", **best)
    with stopped_at(3, r"checkpoint-2 is saved"):
        go("b", **best)
    monkeypatch.setattr(
        "modeling_deepseek_moe.finetune.experts.choose.score_rows", lambda *_: pytest.fail("the rows are scored again")
    )
    with caplog.at_level(logging.WARNING):
        in_two = go("b", **best)
    assert not [record for record in caplog.records if "missing keys" in record.getMessage()]
    assert (at_once["resumed_from"], in_two["resumed_from"]) == (None, "checkpoint-2")
    for result in ("adapter", "model"):
        assert_bit_equal(*(tensors_of(tmp_path / folder / "run" / result) for folder in ("a", "b")))
    same = ("steps", "train_loss", "eval_loss_before", "eval_loss_after", "trained_experts")
    assert [at_once[key] for key in same] == [in_two[key] for key in same]


def test_another_choice_is_another_run(go, tmp_path):
    go(**given(tmp_path))
    changed = given(tmp_path, experts={"1": [2]})
    with pytest.raises(
        RecipeError, match="holds another run .the file of `esft.experts` has changed since.: choose another"
    ):
        go(**changed)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"lora.targets": ["all"]}, "`lora` and `esft` are two ways"),
        ({"quantization": "nf4"}, "`quantization` is nf4, whose weights are frozen"),
        ({"esft.top_p": 1.2}, "`esft.top_p` is 1.2: it must be above 0 and 1 at most"),
        ({"esft.score": "tokens"}, "`esft.score` is 'tokens'"),
        ({"esft.sample_tokens": 0}, "`esft.sample_tokens` is 0"),
        ({"esft.expert": "a.json"}, "unknown recipe key `esft.expert`: did you mean `esft.experts`?"),
        ({"esft.experts": "absent.json"}, "absent.json, the experts to train, is no file"),
        ({"training.fsdp": "full_shard"}, "`training.fsdp` cuts up stacks of experts"),
        ({"bias_update_speed": 0.001}, "`bias_update_speed` moves the routers' bias"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_run_ends_in_one_line_and_leaves_nothing(go, tmp_path, overrides, message):
    with pytest.raises(UserError) as caught:
        go(**{"esft.score": "token", **overrides})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "a" / "run").exists()


def test_a_choice_made_for_a_larger_model_ends_in_one_line(go, tmp_path):
    with pytest.raises(UserError, match="layer 1 names expert 56, of 8"):
        go(**given(tmp_path, experts={"1": [3, 56]}))
    assert not (tmp_path / "a" / "run").exists()


def test_an_adapter_of_another_model_changes_nothing(tmp_path):
    model, other = tiny_model(tiny_config("v3")), tiny_model(tiny_config("v3", moe_intermediate_size=24), seed=1)
    train_chosen(other, choice())
    save_esft_adapter(other, tmp_path / "adapter")
    with pytest.raises(ValueError, match="the model is in training"):
        load_esft_adapter(other, tmp_path / "adapter")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="cannot put adapter .* on the model: "):
        put_adapter(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"proj.weight is \[.*\], not \[.*\] as in the model"):
        load_esft_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "expert_cfg.json").write_text(json.dumps(choice({"1": [6, 0, 3, 2]})))
    with pytest.raises(CheckpointError, match=r"lacks tensor .*experts.2.*, which expert_cfg.json announces"):
        load_esft_adapter(model, tmp_path / "adapter")
    assert_bit_equal(model.state_dict(), before)
    assert isinstance(next(iter(blocks_of(release(other)).values())).experts, DeepseekMoeExperts)


@pytest.mark.parametrize("weight", [0.0, 0.1], ids=["idle", "trained"])
def test_layers_of_multi_token_prediction_are_trained_only_by_their_loss(weight):
    model = tiny_model(tiny_config("v3", mtp_loss_weight=weight))
    train_chosen(model, choice({"1": [3], **({"3": [2]} if weight else {})}, non_expert_modules=True))
    ids = tiny_ids(model.config)
    model.train()(ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(".layers.3." in name for name in trained) == bool(weight)
    assert ("model.layers.3.mlp.experts.down" in trained) == bool(weight)
