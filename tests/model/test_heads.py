"""Sequence and token classification: shapes, losses against PyTorch's own, training, and the Auto classes."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from modeling_deepseek_moe import DeepseekMoeForSequenceClassification, DeepseekMoeForTokenClassification

LINEAGES = ["v1", "v2", "v3"]
PAD = 2
HEADS = {
    "sequence": (AutoModelForSequenceClassification, DeepseekMoeForSequenceClassification),
    "token": (AutoModelForTokenClassification, DeepseekMoeForTokenClassification),
}


def head_config(lineage: str = "v3", **overrides):
    return tiny_config(lineage, **{"num_labels": 3, "pad_token_id": PAD, **overrides})


def real_ids(config, batch: int = 3, length: int = 8) -> torch.Tensor:
    """Random ids without the padding token."""
    ids = tiny_ids(config, batch, length)
    return ids.masked_fill(ids == PAD, PAD + 1)


@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_a_sequence_is_scored_at_its_last_real_token_on_either_side_of_padding(lineage):
    model = tiny_model(head_config(lineage), model_class=DeepseekMoeForSequenceClassification)
    ids = real_ids(model.config, batch=2)
    ids[1, 5:] = PAD
    mask = (ids != PAD).long()
    scores = model(ids, attention_mask=mask).logits
    assert scores.shape == (2, 3)
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(scores, model.score(hidden[torch.arange(2), [7, 4]]), atol=1e-6, rtol=1e-6)
    # The same tokens with the padding in front; positions are relative, so only float32 roundings change.
    left = torch.cat([torch.full((1, 3), PAD), ids[1:, :5]], dim=1)
    left_scores = model(left, attention_mask=(left != PAD).long()).logits
    torch.testing.assert_close(left_scores, scores[1:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_token_classification_scores_every_token_and_ignores_what_labels_ignore(lineage):
    model = tiny_model(head_config(lineage), model_class=DeepseekMoeForTokenClassification)
    ids = real_ids(model.config)
    labels = torch.randint(3, ids.shape, generator=torch.Generator().manual_seed(0))
    labels[:, :2] = -100
    outputs = model(ids, labels=labels)
    assert outputs.logits.shape == (*ids.shape, 3)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("problem_type", ["regression", "single_label_classification", "multi_label_classification"])
def test_each_problem_type_has_its_loss(problem_type):
    model = tiny_model(head_config(problem_type=problem_type), model_class=DeepseekMoeForSequenceClassification)
    ids = real_ids(model.config)
    generator = torch.Generator().manual_seed(0)
    labels, loss_of = {
        "regression": (torch.randn(3, 3, generator=generator), F.mse_loss),
        "single_label_classification": (torch.tensor([0, 2, 1]), F.cross_entropy),
        "multi_label_classification": (
            torch.randint(2, (3, 3), generator=generator).float(),
            F.binary_cross_entropy_with_logits,
        ),
    }[problem_type]
    outputs = model(ids, labels=labels)
    torch.testing.assert_close(outputs.loss, loss_of(outputs.logits, labels))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_training_step_moves_the_score_and_every_main_parameter(lineage, head):
    config = head_config(lineage, aux_loss_alpha=0.0)
    model = tiny_model(config, model_class=HEADS[head][1]).train()
    ids = real_ids(config, batch=6)
    shape = (6,) if head == "sequence" else ids.shape
    labels = torch.randint(3, shape, generator=torch.Generator().manual_seed(0))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert "score.weight" in before


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("lineage", LINEAGES)
def test_the_auto_class_makes_saves_and_loads_the_head(lineage, head, tmp_path):
    auto_class, model_class = HEADS[head]
    model = auto_class.from_config(head_config(lineage, id2label={0: "a", 1: "b", 2: "c"}))
    assert type(model) is model_class
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is model_class and loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    ids = real_ids(model.config)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_head_on_a_language_models_checkpoint_is_new_and_the_rest_is_read(lineage, head, tmp_path):
    language_model = tiny_model(head_config(lineage))
    language_model.save_pretrained(tmp_path)
    model, report = HEADS[head][0].from_pretrained(
        tmp_path, num_labels=5, dtype=torch.float32, output_loading_info=True
    )
    assert model.score.out_features == 5
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"score"}
    read = model.model.state_dict()
    for name, tensor in language_model.model.state_dict().items():
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("head", HEADS)
def test_heads_report_hidden_states_and_attentions(head):
    config = head_config()
    model = tiny_model(config, model_class=HEADS[head][1])
    model.set_attn_implementation("eager")
    outputs = model(real_ids(config), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == config.num_hidden_layers + 1
    assert len(outputs.attentions) == config.num_hidden_layers


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("head", HEADS)
def test_gradient_checkpointing_gives_a_head_the_same_gradients(head):
    config = head_config(aux_loss_alpha=0.0)
    found = []
    for checkpointed in (False, True):
        model = tiny_model(config, model_class=HEADS[head][1]).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        ids = real_ids(config)
        labels = torch.zeros((3,) if head == "sequence" else ids.shape, dtype=torch.long)
        model(ids, labels=labels).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6 * gradient.abs().max().item(), rtol=0)


@pytest.mark.parametrize("lineage", LINEAGES)
@pytest.mark.parametrize("head", HEADS)
def test_the_loss_of_a_head_in_training_includes_the_balance_losses(head, lineage):
    model = tiny_model(head_config(lineage, aux_loss_alpha=0.5), model_class=HEADS[head][1])
    ids = real_ids(model.config)
    labels = torch.randint(3, ids.shape if head == "token" else ids.shape[:1])
    plain = model(ids, labels=labels).loss
    loss = model.train()(ids, labels=labels).loss
    torch.testing.assert_close(loss, plain + model.model(ids).aux_loss)
    loss.backward()
    share = model.model.layers[1].mlp.gate.weight.grad
    assert torch.equal(model(ids, labels=labels, return_dict=False)[0], loss)
    model.zero_grad()
    model.config.aux_loss_alpha = 0.0
    model(ids, labels=labels).loss.backward()
    assert (share - model.model.layers[1].mlp.gate.weight.grad).abs().max() > 1e-4
