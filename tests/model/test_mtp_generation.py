"""`generate(use_mtp=True)`: greedy output is plain greedy's, and drafts are what the trained modules say.

What a module says is its own forward pass in training, over the whole sequence and without a cache (`as_trained`).
Models are float32. The cached and the whole pass sum in different orders, which moves logits of order ten by a few
float32 roundings a layer: drafts' logits are compared within 1e-4, tokens exactly.
"""

import functools
from importlib import resources
from typing import NamedTuple

import corpus as demo_corpus
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pretrain import BOS
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoTokenizer

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.finetune.model.lora import lora_config
from modeling_deepseek_moe.mtp_generation import MultiTokenCandidateGenerator

ATOL = 1e-4
PAD = 2
LEARNED = 40


class Draft(NamedTuple):
    """One round: the ids it began with, what it put behind them, and how many of the round before were accepted."""

    ids: torch.Tensor
    tokens: torch.Tensor
    logits: torch.Tensor
    accepted_before: int


@pytest.fixture
def rounds(monkeypatch) -> list[Draft]:
    """Every round of drafting in the test, in order."""
    recorded = []
    get_candidates = MultiTokenCandidateGenerator.get_candidates

    def record(self, input_ids, n_last_matches, **kwargs):
        ids, logits = get_candidates(self, input_ids, n_last_matches=n_last_matches, **kwargs)
        if logits is not None:
            recorded.append(Draft(input_ids, ids[:, input_ids.shape[1] :], logits, int(n_last_matches)))
        return ids, logits

    monkeypatch.setattr(MultiTokenCandidateGenerator, "get_candidates", record)
    return recorded


def mtp_model(depth: int = 1, lineage: str = "v3", seed: int = 0, **overrides) -> DeepseekMoeForCausalLM:
    """A random model whose modules guess the next token about once in a vocabulary."""
    fields = {"num_nextn_predict_layers": depth, "mtp_loss_weight": 1.0, "eos_token_id": None, "pad_token_id": PAD}
    return tiny_model(tiny_config(lineage, **{**fields, **overrides}), seed)


def learned_ids(config) -> torch.Tensor:
    return tiny_ids(config, batch=2, length=LEARNED, seed=3)


def trained(model, steps: int) -> DeepseekMoeForCausalLM:
    """`model` after some steps on the same two rows of random tokens: 20 steps are enough to know them by heart."""
    ids = learned_ids(model.config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@functools.cache
def shared_model(depth: int, steps: int = 20) -> DeepseekMoeForCausalLM:
    """Trained once for all tests, which leave it as it is."""
    return trained(mtp_model(depth, num_hidden_layers=2), steps)


def greedy(model, ids, steps: int = 16, **options) -> torch.Tensor:
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": PAD, **options}
    return model.generate(input_ids=ids, max_new_tokens=steps, do_sample=False, **options)


@torch.no_grad()
def as_trained(model, rounds: list[Draft]) -> list[torch.Tensor]:
    """For each round, what `model`'s training forward computes in the place of its logits: `[1, drafts, V]`."""
    # Module k joins a state with the token k places on: for k > 1 that is a draft. What follows is not seen.
    rows = [torch.cat([draft.ids, draft.tokens[:, :-1]], dim=1)[0] for draft in rounds]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    states = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: states.append(output[0]))
        for layer in model.model.layers[model.config.num_hidden_layers :]
    ]
    model.train()(ids, labels=ids, use_cache=False)
    model.eval()
    for hook in hooks:
        hook.remove()
    last = [draft.ids.shape[1] - 2 for draft in rounds]
    drafted = [range(draft.tokens.shape[1]) for draft in rounds]
    return [
        model.lm_head(torch.stack([states[k][row, last[row]] for k in drafted[row]])[None])
        for row in range(len(rounds))
    ]


def assert_drafts_are_as_trained(model, rounds: list[Draft], greedily: bool = True) -> None:
    assert rounds
    for draft, expected in zip(rounds, as_trained(model, rounds), strict=True):
        torch.testing.assert_close(draft.logits, expected, atol=ATOL, rtol=0)
        assert not greedily or torch.equal(draft.tokens, expected.argmax(-1))


def share_accepted(rounds: list[Draft]) -> float:
    """Of the drafts of all rounds but a generation's last, whose outcome no later round tells."""
    known = [
        (now.tokens.shape[1], after.accepted_before)
        for now, after in zip(rounds, rounds[1:], strict=False)
        if after.ids.shape[1] > now.ids.shape[1]
    ]
    return sum(accepted for _, accepted in known) / sum(drafted for drafted, _ in known)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("depth, lineage", [(1, "v3"), (2, "v3"), (3, "v3"), (2, "v1")])
def test_a_random_model_whose_drafts_are_rejected_generates_plain_greedy(depth, lineage, attention, rounds):
    model = mtp_model(depth, lineage)
    model.set_attn_implementation(attention)
    for length in (1, 9):
        ids = tiny_ids(model.config, batch=1, length=length, seed=length)
        assert torch.equal(greedy(model, ids, steps=10, use_mtp=True), greedy(model, ids, steps=10))
    assert share_accepted(rounds) < 0.2


@pytest.mark.parametrize("depth", [1, 2])
def test_a_model_that_knows_the_text_accepts_its_drafts_and_generates_plain_greedy(depth, rounds):
    model = shared_model(depth)
    ids = learned_ids(model.config)
    for row in ids.split(1):
        assert torch.equal(greedy(model, row[:, :8], use_mtp=True), greedy(model, row[:, :8]))
    assert share_accepted(rounds) > 0.9
    # A pass of the main model yields the accepted drafts and a token of its own; the first pass has no drafts.
    assert len(rounds) <= 2 * (15 // (depth + 1) + 1)


@pytest.mark.parametrize("depth, lineage", [(1, "v3"), (2, "v3"), (3, "v3"), (2, "v1")])
def test_drafts_from_the_cache_are_those_of_the_training_pass_over_everything(depth, lineage, rounds):
    """A half-trained model accepts none, some or all of a round's drafts, so that caches are cut at every place."""
    model = trained(mtp_model(depth, lineage, num_hidden_layers=2), 10)
    for row in learned_ids(model.config).split(1):
        for length in (2, 7):
            greedy(model, row[:, 5 : 5 + length], use_mtp=True)
    accepted = {draft.accepted_before for draft in rounds}
    assert {0, depth} <= accepted
    assert depth == 1 or accepted - {0, depth}, "no round of which only some drafts were accepted"
    assert_drafts_are_as_trained(model, rounds)


@pytest.mark.parametrize("depth", [1, 2])
def test_left_padding_changes_neither_output_nor_drafts(depth, rounds):
    model = shared_model(depth, 12)
    ids = learned_ids(model.config)[:1, 3:10]
    alone = greedy(model, ids, use_mtp=True)
    unpadded = rounds.copy()
    rounds.clear()
    padding = torch.full((1, 4), PAD)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], dim=1)
    padded = greedy(model, torch.cat([padding, ids], dim=1), attention_mask=mask, use_mtp=True)
    assert torch.equal(padded[:, 4:], alone)
    assert len(rounds) == len(unpadded)
    for draft, expected in zip(rounds, unpadded, strict=True):
        torch.testing.assert_close(draft.logits, expected.logits, atol=ATOL, rtol=0)


def test_the_weights_in_memory_draft_whatever_a_checkpoint_holds(tmp_path, rounds):
    """Just loaded, after a change in memory, and after a training step; the file stays as it was."""
    mtp_model().save_pretrained(tmp_path)
    model = DeepseekMoeForCausalLM.from_pretrained(tmp_path)
    ids = tiny_ids(model.config, batch=1, length=9)
    expected = greedy(model, ids, steps=6)
    assert torch.equal(greedy(model, ids, steps=6, use_mtp=True), expected)
    assert_drafts_are_as_trained(model, rounds)
    loaded = rounds[0].logits
    rounds.clear()

    with torch.no_grad():
        model.model.layers[-1].eh_proj.weight.neg_()
    assert torch.equal(greedy(model, ids, steps=6, use_mtp=True), expected)
    assert (rounds[0].logits - loaded).abs().max() > 0.1
    assert_drafts_are_as_trained(model, rounds)
    rounds.clear()

    trained(model, 1)
    assert torch.equal(greedy(model, ids, steps=6, use_mtp=True), greedy(model, ids, steps=6))
    assert_drafts_are_as_trained(model, rounds)


def test_a_model_left_in_training_mode_drafts_too(rounds):
    model = shared_model(1).train()
    try:
        ids = learned_ids(model.config)[:1, :6]
        assert torch.equal(greedy(model, ids, use_mtp=True), greedy(model, ids))
    finally:
        model.eval()
    assert share_accepted(rounds) > 0.9


def adapted(model, config: LoraConfig):
    """`model` in a PEFT model whose adapters do something: their B would begin as zero."""
    torch.manual_seed(1)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return peft_model.eval()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_peft_model_with_every_kind_of_adapter_generates_plain_greedy_and_drafts_with_them(depth, rounds):
    model = mtp_model(depth)
    ids = tiny_ids(model.config, batch=1, length=9)
    with torch.no_grad():
        unadapted = model(ids).logits
        peft_model = adapted(model, lora_config(model, ["all"], r=4))
        assert (peft_model(ids).logits - unadapted).abs().max() > 0.1
    assert torch.equal(greedy(peft_model, ids, steps=6, use_mtp=True), greedy(peft_model, ids, steps=6))
    assert_drafts_are_as_trained(model, rounds)


def test_an_adapter_on_the_mtp_module_changes_the_drafts_and_nothing_else(rounds):
    model = mtp_model()
    ids = tiny_ids(model.config, batch=1, length=9)
    expected = greedy(model, ids, steps=4, use_mtp=True)
    plain = rounds[0].logits
    rounds.clear()
    peft_model = adapted(model, lora_config(model, ["attention"], r=4, layers_to_transform=[3]))
    assert torch.equal(greedy(peft_model, ids, steps=4, use_mtp=True), expected)
    assert (rounds[0].logits - plain).abs().max() > 0.1
    assert_drafts_are_as_trained(model, rounds)
    rounds.clear()
    with peft_model.disable_adapter():
        greedy(peft_model, ids, steps=4, use_mtp=True)
    torch.testing.assert_close(rounds[0].logits, plain)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_limit_or_an_end_token_within_the_drafts_stops_where_plain_greedy_does(depth, rounds):
    model = shared_model(depth)
    ids = learned_ids(model.config)[:1, :5]
    longest = greedy(model, ids, steps=7)
    for steps in range(1, 8):
        rounds.clear()
        assert torch.equal(greedy(model, ids, steps=steps, use_mtp=True), longest[:, : 5 + steps])
        assert all(draft.ids.shape[1] + draft.tokens.shape[1] < 5 + steps for draft in rounds), "too many drafts"
    for end in longest[0, 5:9].tolist():
        stopped = greedy(model, ids, steps=7, eos_token_id=end)
        assert torch.equal(greedy(model, ids, steps=7, eos_token_id=end, use_mtp=True), stopped)


@pytest.mark.parametrize("depth", [1, 2])
def test_logits_processors_act_on_drafts_as_on_the_main_model(depth, rounds):
    model = shared_model(depth)
    ids = learned_ids(model.config)[:1, :6]
    banned = int(greedy(model, ids, steps=5)[0, -1])
    options = {"bad_words_ids": [[banned]], "repetition_penalty": 1.3}
    assert torch.equal(greedy(model, ids, use_mtp=True, **options), greedy(model, ids, **options))
    assert all(torch.isneginf(draft.logits[..., banned]).all() for draft in rounds)


def test_outputs_asked_for_are_those_of_plain_greedy():
    model = shared_model(1)
    ids = learned_ids(model.config)[:1, :6]
    options = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True, "steps": 10}
    plain, drafted = (greedy(model, ids, use_mtp=use_mtp, **options) for use_mtp in (False, True))
    torch.testing.assert_close(torch.stack(drafted.scores), torch.stack(plain.scores), atol=ATOL, rtol=0)
    assert len(drafted.hidden_states) == len(plain.hidden_states)
    for step, expected in zip(drafted.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(step, expected, atol=ATOL, rtol=0)


def test_sampling_with_drafts_keeps_the_main_models_distribution(rounds):
    """Drafts come with the logits they were drawn from, and tokens are as probable as the main model's own choice.

    The sum of 160 tokens' log-probabilities is compared with its mean, minus the sum of the entropies, in standard
    deviations. Drafts that are always the likeliest token leave the bound of 3.
    """
    model = mtp_model(initializer_range=0.2)
    ids = tiny_ids(model.config, batch=1, length=4)
    torch.manual_seed(0)
    sampled = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=160, do_sample=True, top_k=0, use_mtp=True
    )
    assert share_accepted(rounds) > 0.1, "rejected drafts alone test little"
    assert_drafts_are_as_trained(model, rounds, greedily=False)
    with torch.no_grad():
        log_probs = model(sampled[:, :-1]).logits[0, 3:].double().log_softmax(-1)
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    variances = (log_probs.exp() * log_probs.square()).sum(-1) - entropies.square()
    chosen = log_probs.gather(-1, sampled[0, 4:, None])
    assert abs(chosen.sum() + entropies.sum()) / variances.sum().sqrt() < 3


def test_the_shipped_base_accepts_most_drafts_of_answers_it_learned(rounds):
    """Held-out tasks of the kinds it was pretrained on.

    The base of the repository has about 0.7 over a hundred tasks; 0.4 leaves room for five tasks and for a base
    pretrained anew. A module out of step with its training, or untrained, is near 0.
    """
    folder = resources.files("modeling_deepseek_moe.model_cards") / "demo_base"
    model = DeepseekMoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = demo_corpus.documents(seed=0, task_share=1.0, held_out=True)
    for _, document in zip(range(5), documents, strict=False):
        ids = tokenizer(BOS + document.prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert torch.equal(greedy(model, ids, steps=32, use_mtp=True), greedy(model, ids, steps=32))
    assert share_accepted(rounds) > 0.4
