"""The shipped base of the demo, its corpus, and the script that pretrained it."""

import itertools
import json
import math

import corpus as demo_corpus
import pretrain as demo_base
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.balancing import expert_load
from modeling_deepseek_moe.finetune.demo import task as demo_task
from modeling_deepseek_moe.finetune.demo.one_demo import base_folder

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_folder())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def fresh_rows(tokenizer):
    """Sixteen rows of documents that pretraining never saw, `[16, 128]`, and their labels."""
    packed = demo_base.PackedRows(tokenizer, length=128, rows=10**6, task_share=0.97, held_out=True)
    rows = [packed[999_000 + number] for number in range(16)]
    return {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}


def test_the_base_is_a_v3_in_small_of_at_most_ten_megabytes(model):
    assert (base_folder() / "model.safetensors").stat().st_size <= 10 * MEGABYTE
    config = model.config
    assert isinstance(model, DeepseekMoeForCausalLM)
    assert (config.scoring_func, config.topk_method, config.n_shared_experts) == ("sigmoid", "noaux_tc", 1)
    assert config.kv_lora_rank and config.q_lora_rank and config.num_nextn_predict_layers == 1


def test_the_base_is_stored_in_bfloat16_with_a_float32_bias_that_has_moved():
    with safe_open(base_folder() / "model.safetensors", "pt") as file:
        biases = [file.get_tensor(name) for name in file.keys() if name.endswith("e_score_correction_bias")]  # noqa: SIM118
        others = {
            file.get_slice(name).get_dtype()
            for name in file.keys()  # noqa: SIM118
            if not name.endswith("e_score_correction_bias")
        }
    assert others == {"BF16"}
    assert all(bias.dtype == torch.float32 and bias.abs().max() > 0.001 for bias in biases)
    assert len(biases) == 4


def test_the_base_predicts_unseen_text_far_better_than_chance(model, fresh_rows):
    with torch.inference_mode():
        loss = model(**fresh_rows).loss.item()
    assert loss < 0.5 * math.log(model.config.vocab_size)


def test_every_expert_of_the_base_is_used_on_unseen_text(model, fresh_rows):
    loads = {}
    routers = {name: m for name, m in model.named_modules() if hasattr(m, "e_score_correction_bias")}
    handles = [
        router.register_forward_hook(
            lambda module, _, output, name=name: loads.update({name: expert_load(output[2], 16)})
        )
        for name, router in routers.items()
    ]
    with torch.inference_mode():
        model(fresh_rows["input_ids"])
    for handle in handles:
        handle.remove()
    assert len(loads) == model.config.num_hidden_layers - model.config.first_k_dense_replace
    assert all(load.min() > 0 for load in loads.values())


def test_the_log_of_the_pretraining_is_shipped_and_ends_lower_than_it_began():
    log = json.loads((base_folder() / "training_log.json").read_text(encoding="utf-8"))
    losses = [row["eval_loss"] for row in log["history"] if "eval_loss" in row]
    assert len(losses) >= 5 and losses[-1] < 0.7 * losses[0]
    assert (base_folder() / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["Spell héllo: 1234\n\n    def f(x):\n", "日本 <|user|>", " a  b\t\n"])
def test_the_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_tokenizer_splits_digits_and_rare_words_into_single_characters(tokenizer):
    assert tokenizer.tokenize(" zyzzyva 307") == ["Ġ", *"zyzzyva", "Ġ", *"307"]


def test_the_chat_template_writes_what_the_corpus_writes(tokenizer):
    messages = [{"role": "user", "content": "sun?"}, {"role": "assistant", "content": "nus"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == demo_base.BOS + demo_task.as_prompt("sun?")
    assert whole == prompt + "nus" + demo_base.EOS


def test_the_corpus_is_the_same_for_the_same_seed_and_never_holds_the_demos_task():
    first, again = ([*itertools.islice(demo_corpus.documents(3), 400)] for _ in range(2))
    assert first == again
    sources = {document.source for document in first}
    assert sources == {*demo_corpus.PRETRAINING_TASKS, "library"}
    assert not any("backward" in document.prompt for document in first)
    assert demo_task.DEMO_TASK not in demo_corpus.PRETRAINING_TASKS


def test_held_out_library_text_is_from_other_modules():
    training = set(demo_corpus.library_snippets())
    held_out = [text for text in demo_corpus.library_snippets(held_out=True) if len(text) > 200]
    assert held_out and not training & set(held_out)


@pytest.mark.slow
def test_pretraining_starts_again_from_its_last_checkpoint(tmp_path):
    recipe = demo_base.read_recipe()
    recipe["model"] |= {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    recipe["data"] |= {"tokenizer_documents": 200, "batch_size": 2, "length": 32, "validation_rows": 2}
    recipe["training"] |= {
        "max_steps": 2,
        "lr_scheduler_kwargs": {"num_decay_steps": 0},
        "warmup_steps": 0,
        "disable_tqdm": True,
    }
    recipe["training"] |= {"logging_steps": 1, "eval_steps": 1, "save_steps": 1}
    demo_base.pretrain(tmp_path, recipe)
    recipe["training"] |= {"max_steps": 3}
    log = demo_base.pretrain(tmp_path, recipe)
    assert [row["step"] for row in log["history"] if "loss" in row] == [1, 2, 3]
    assert (tmp_path / "loss.png").is_file()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_nextn_predict_layers == 1
