"""`deepseek-moe evaluate` and a recipe's metric: what is asked, how it is judged, before and after."""

import json
import math

import datasets
import pytest
import torch
import yaml
from peft import get_peft_model
from tiny import tiny_config, tiny_model
from tiny_run import WORDS, counting_rows, stopped_at, tiny_base, tiny_tokenizer, tiny_values, write_jsonl
from typer.testing import CliRunner

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.data.chat import encode_whole
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.evaluate.answers import Question, generate_answers, question_of
from modeling_deepseek_moe.finetune.evaluate.harness import load_tasks, run_tasks
from modeling_deepseek_moe.finetune.evaluate.measure import evaluate_model
from modeling_deepseek_moe.finetune.evaluate.metrics import score_answers
from modeling_deepseek_moe.finetune.evaluate.perplexity import score_text
from modeling_deepseek_moe.finetune.model.lora import known_warnings, lora_config
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import metric as run_metric
from modeling_deepseek_moe.finetune.train import one_run as train

pytestmark = pytest.mark.usefixtures("metric_cache")

# A metric of a user's own: mean number of words.
OWN_METRIC = """
import datasets
import evaluate

class Words(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"words": sum(len(answer.split()) for answer in predictions) / len(references)}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def base(folder):
    return tiny_base(folder / "base")


@pytest.fixture(scope="module")
def adapter(folder, base):
    model = DeepseekMoeForCausalLM.from_pretrained(base)
    with known_warnings():
        adapted = get_peft_model(model, lora_config(model, ["all"], r=4))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder / "adapter")
    return folder / "adapter"


def own_metric(folder, text=OWN_METRIC):
    path = folder / "own_metric.py"
    path.write_text(text)
    return path


def prompts(count=7):
    """Questions of 1 to 4 words."""
    return [" ".join(WORDS[(9 * i + j) % 80] for j in range(1 + i % 4)) for i in range(count)]


def call(*arguments):
    return CliRunner().invoke(app, ["evaluate", *(str(argument) for argument in arguments)])


def test_a_question_is_what_stands_before_the_last_learned_part():
    tokenizer = tiny_tokenizer()
    chat = [("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4 w5")]
    row = {"messages": [{"role": role, "content": content} for role, content in chat]}
    question = question_of(*encode_whole(row, tokenizer), tokenizer.bos_token_id)
    assert tokenizer.decode(question.prompt) == "<s> <user> w1 <bot> w2 </s> <user> w3 <bot>"
    assert tokenizer.decode(question.reference) == "w4 w5 </s>"
    asked = question_of(*encode_whole({"prompt": "w1", "completion": " w2"}, tokenizer), 0)
    assert tokenizer.decode(asked.prompt) == "<s> w1"
    assert question_of(*encode_whole({"text": "w1 w2"}, tokenizer), 0) is None


@pytest.mark.parametrize("lineage", ["v1", "v3"])
def test_answers_in_batches_are_those_of_each_question_alone_and_in_its_place(lineage):
    model, tokenizer = tiny_model(tiny_config(lineage, pad_token_id=2)), tiny_tokenizer()
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts(9)]
    alone = []
    for prompt in ids:
        tokens = model.eval().generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=2)
        alone.append(tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True))
    model.train()
    questions = [Question(prompt, [5, 1]) for prompt in ids]
    assert generate_answers(model, tokenizer, questions, max_new_tokens=6, batch_size=4) == alone
    assert len(set(alone)) == 9
    assert model.training, "the model comes back as it was"
    longer = generate_answers(model, tokenizer, [Question(ids[0], [5] * 9)])
    assert len(longer[0].split()) > 6, "an answer may be twice as long as the longest reference, and 16 tokens"


@pytest.mark.parametrize(
    "metric, answers, references, scores",
    [
        ("exact_match", [" a b ", "a  b", "A b"], ["a b"] * 3, {"exact_match": 1 / 3}),
        (
            "json_match",
            ['{"b": [1, 2.0], "a": null}', '{"a": null, "b": [2, 1]}', "{", '{"a": null, "b": [true, 2]}'],
            ['{"a":null,"b":[1.0,2]}'] * 4,
            {"json_match": 0.25, "valid_json": 0.75},
        ),
    ],
    ids=["exact_match", "json_match"],
)
def test_shipped_metrics_count_what_they_say(metric, answers, references, scores):
    assert score_answers(metric, answers, references) == pytest.approx(scores)


def test_before_and_after_an_adapter_stand_in_one_table_and_both_files(base, adapter, folder, tmp_path):
    # References are what the adapted model says: it is right in all of them.
    rows = [{"prompt": prompt, "completion": " w0"} for prompt in prompts(12)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    first = evaluate_model(base, adapter=adapter, data=data, max_new_tokens=3, output=tmp_path)
    said = [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    rows = [row | {"completion": f" {answer}"} for row, answer in zip(rows, said, strict=True) if answer]
    assert len(rows) > 7
    write_jsonl(data, rows)
    options = ("--data", data, "--max-new-tokens", 3, "--output", tmp_path / "out", "--batch-size", 3)

    result = call(base, "--adapter", adapter, *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert first["after"] == {"data exact_match": 0} != report["after"] == {"data exact_match": 1}
    assert report["before"]["data exact_match"] < 1 and report["base"] == str(base)
    for shown in ("before", "after", "change", "data exact_match", "1.0000"):
        assert shown in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [f"<s> {row['prompt']}" for row in rows]
    assert all(line["answer"] == line["reference"] for line in lines)
    right = sum(line["before"] == line["reference"] for line in lines) / len(lines)
    assert report["before"]["data exact_match"] == pytest.approx(right)

    result = call(base, *options, "--metric", own_metric(tmp_path), "--limit", 4)
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert report["before"] is None and len(lines) == report["data"]["rows"] == 4
    words = sum(len(line["answer"].split()) for line in lines) / 4
    assert report["after"] == {"data words": words} and words > 0
    assert not list(tmp_path.rglob("*.aside"))


def test_a_second_model_is_measured_as_before(base, folder, tmp_path):
    other = tiny_base(tmp_path / "other", lineage="v1")
    (tmp_path / "text.txt").write_text(" ".join(prompts(20)))
    report = evaluate_model(other, before=base, text=tmp_path / "text.txt", window=20, output=tmp_path / "out")
    text = (tmp_path / "text.txt").read_text()
    for key, model in (("before", base), ("after", other)):
        model = DeepseekMoeForCausalLM.from_pretrained(model).eval()
        score = score_text(model, tiny_tokenizer(), text, window=20)
        # Windows in batches, or one by one.
        assert report[key]["text perplexity"] == pytest.approx(score.perplexity, rel=1e-4)
        assert report[key]["text bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-5)
    assert report["before"] != report["after"]


def harness_tasks(tmp_path):
    """A task that compares answers, and one that foresees texts."""
    docs = [{"q": prompt, "a": i % 2} for i, prompt in enumerate(prompts(6))]
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_jsonl(tmp_path / "docs.jsonl", docs))}},
        "test_split": "test",
    }
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"}
    choice |= {"doc_to_choice": ["w3", "w70"], "metric_list": [{"metric": "acc"}]}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}"}
    rolling |= {"metric_list": [{"metric": "bits_per_byte"}]}
    for name, task in (("choice", choice), ("rolling", rolling)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return docs


def test_tasks_of_the_harness_see_bos_exactly_once(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    docs = harness_tasks(tmp_path)
    model, tokenizer = tiny_model(tiny_config("v3", pad_token_id=2)).eval(), tiny_tokenizer()
    manager, names = load_tasks([str(tmp_path / "choice.yaml"), str(tmp_path / "rolling.yaml")])
    found = run_tasks(model, tokenizer, manager, names, batch_size=4)

    texts = [score_text(model, tokenizer, doc["q"]) for doc in docs]
    bits = sum(text.nats for text in texts) / math.log(2) / sum(text.bytes for text in texts)
    assert found["rolling bits_per_byte"] == pytest.approx(bits, rel=1e-4)  # batches of other lengths
    chosen = []
    for doc in docs:
        logits = model(torch.tensor([[0, *tokenizer(doc["q"])["input_ids"]]])).logits[0, -1]
        one, other = tokenizer("w3 w70")["input_ids"]
        chosen.append(int(logits[other] > logits[one]))
    assert set(chosen) == {0, 1}
    right = sum(choice == doc["a"] for choice, doc in zip(chosen, docs, strict=True)) / len(docs)
    assert found["choice acc"] == pytest.approx(right) and found["choice acc_stderr"] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to measure: name --tasks, --text or --data"),
        (["--tasks", ""], "no task is named"),
        (["--tasks", "absent.yaml"], "task file absent.yaml does not exist"),
        (["--text", "absent.txt"], "cannot read text absent.txt: No such file"),
        (["--data", "absent.jsonl"], "data 'absent.jsonl' does not exist"),
        (["--data", "text.jsonl"], "text.jsonl, line 2: the row has an answer but no question"),
        (["--data", "chat.jsonl"], "chat.jsonl, line 1: `messages` has no turn with the role 'assistant'"),
        (["--data", "empty.jsonl"], "data 'empty.jsonl' has no rows"),
        (["--data", "good.jsonl", "--metric", "./absent.py"], "metric './absent.py' does not exist: give the path"),
        (["--data", "good.jsonl", "--metric", "own_metric.py"], "metric 'own_metric.py' failed: out of ideas"),
        (["--data", "good.jsonl", "--metric", "json_match"], "metric 'json_match' failed: a reference is not JSON"),
        (["--metric", "exact_match"], "--metric judges answers to the rows of --data"),
        (["--text", "good.jsonl", "--limit", "0"], "--limit is 0: it is 1 at least"),
        (["--text", "good.jsonl", "--adapter", "/nowhere"], "cannot put adapter '/nowhere' on the model"),
        (["--text", "good.jsonl", "--before", "/nowhere"], "cannot load model '/nowhere'"),
        (["--text", "good.jsonl", "--output", "good.jsonl/out"], "cannot write to output folder good.jsonl/out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_ends_in_one_line_and_leaves_no_folder(
    base, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    good = {"prompt": "w1", "completion": " w2"}
    write_jsonl(tmp_path / "good.jsonl", [good])
    write_jsonl(tmp_path / "text.jsonl", [good, {"text": "w1"}])
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "w1"}]}])
    write_jsonl(tmp_path / "empty.jsonl", [])
    own_metric(tmp_path, OWN_METRIC.replace("return {", "raise ValueError('out of ideas')  # {"))
    result = call(base, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "evaluation").exists()


def test_an_unknown_task_names_the_nearest_one(monkeypatch):
    from lm_eval import tasks

    class Manager:  # reading the names of all tasks takes seconds
        task_index = {"arc_easy": None}
        all_tasks = ["arc_easy"]

        def __init__(self, include_defaults):
            assert include_defaults

    monkeypatch.setattr(tasks, "TaskManager", Manager)
    with pytest.raises(UserError, match="unknown task 'arc_eazy': did you mean 'arc_easy'?"):
        load_tasks(["arc_eazy"])


def test_a_model_of_another_tokenizer_is_no_before(base, tmp_path):
    other = tiny_base(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    write_jsonl(tmp_path / "rows.jsonl", counting_rows("prompt"))
    with pytest.raises(UserError, match="have different tokenizers"):
        evaluate_model(base, before=other, data=tmp_path / "rows.jsonl", output=tmp_path / "out")


@pytest.fixture
def go(tmp_path, base):
    def go(name="run", **overrides):
        values = tiny_values(tmp_path, base, **{"output_dir": str(tmp_path / name), **overrides})
        return train.run(make_recipe(values))

    return go


def test_a_recipes_metric_is_that_of_evaluate_and_changes_nothing_else(go, base, tmp_path, capsys):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", counting_rows("prompt")[1::4])
    options = {"eval_data": str(held_out), "training.save_steps": 6}
    measured, plain = go(metric=str(own_metric(tmp_path)), **options), go("plain", **options)
    before, after = (measured[key]["words"] for key in ("metric_before", "metric_after"))
    assert before != after
    assert f"{before:.4f} before, {after:.4f} after" in capsys.readouterr().out
    report = evaluate_model(
        base,
        adapter=measured["saved_adapter"],
        data=held_out,
        metric=own_metric(tmp_path),
        output=tmp_path / "evaluation",
    )
    assert [report[key] for key in ("before", "after")] == [{"data words": before}, {"data words": after}]
    assert (plain["metric_before"], plain["metric_after"]) == (None, None)
    assert [measured[key] for key in ("train_loss", "eval_loss_after")] == [
        plain[key] for key in ("train_loss", "eval_loss_after")
    ]


def test_a_resumed_run_finds_what_was_measured_before_the_first_step(go, tmp_path, monkeypatch):
    asked = []
    real = run_metric.generate_answers

    def counted(model, tokenizer, questions, **options):
        asked.append(len(questions))
        return real(model, tokenizer, questions, **options)

    monkeypatch.setattr(run_metric, "generate_answers", counted)
    with stopped_at(3):
        go(metric="exact_match", metric_rows=4)
    assert asked == [4]
    resumed = go(metric="exact_match", metric_rows=4)
    assert asked == [4, 4] and resumed["resumed_from"] == "checkpoint-2"
    assert resumed["metric_before"] == {"exact_match": 0}
    # Another metric on a run that is at its end: there is no before to measure any more.
    again = go(metric=str(own_metric(tmp_path)))
    assert again["metric_before"] is None and set(again["metric_after"]) == {"words"}
    assert asked == [4, 4, 6]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"metric": "absent.py"}, "metric 'absent.py' does not exist"),
        ({"metric": "exact_match", "metric_rows": 0}, "`metric_rows` is 0"),
        ({"metric": "exact_match", "eval_fraction": 0}, "`metric` is measured on held-out rows"),
        ({"metric": "exact_match", "kind": "text"}, "has a question and an answer: leave `metric` out"),
        ({"metric": "exact_match", "max_length": 5}, "no held-out row shorter than max_length=5"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_metric_that_cannot_be_measured_ends_in_one_line(go, overrides, message):
    with pytest.raises(UserError) as caught:
        go(**overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)
