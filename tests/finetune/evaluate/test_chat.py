"""Conversations: what is kept between answers changes no answer, and what the terminal does with lines and Ctrl-C."""

import json
import os
import signal
import sys

import pytest
from tiny import tiny_config, tiny_model
from tiny_run import TEMPLATE, WORDS, tiny_base, tiny_tokenizer
from typer.testing import CliRunner

from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.data.chat import encode
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.evaluate import chat as chat_module
from modeling_deepseek_moe.finetune.evaluate.answers import stop_tokens
from modeling_deepseek_moe.finetune.evaluate.conversation import Conversation

QUESTIONS = [" ".join(WORDS[start : start + 4]) for start in (0, 31, 7, 55)]
# A template that shows the last question only: every turn changes what stands before it.
FORGETFUL = "{{ bos_token }} <user> {{ messages[-1].content }} <bot>"


def talk(*lines, options=()):
    """`deepseek-moe chat` with lines from a pipe."""
    return lambda base: CliRunner().invoke(
        app, ["chat", str(base), "--max-new-tokens", "6", *options], input="".join(f"{line}\n" for line in lines)
    )


def answers(base, *lines, options=("--greedy",)):
    result = talk(*lines, options=options)(base)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["growing history", "rewritten history"])
@pytest.mark.parametrize("lineage", ["v1", "v3"])
def test_answers_are_those_of_a_model_that_reads_everything_again(lineage, template):
    model = tiny_model(tiny_config(lineage, pad_token_id=2)).eval()
    tokenizer = tiny_tokenizer(template)
    kept = Conversation(model, tokenizer, max_new_tokens=8, do_sample=False)
    computed, prompts = [], []

    def ask(question):
        fresh = Conversation(model, tokenizer, max_new_tokens=8, do_sample=False)
        fresh.messages = kept.messages
        pieces = []
        answer = kept.ask(question, show=pieces.append)
        assert answer == fresh.ask(question) == "".join(pieces).strip()
        assert fresh.computed_tokens == fresh.prompt_tokens == kept.prompt_tokens
        computed.append(kept.computed_tokens)
        prompts.append(kept.prompt_tokens)

    for question in QUESTIONS:
        ask(question)
    kept.undo()
    ask(QUESTIONS[0])
    kept.clear()
    ask(QUESTIONS[1])
    assert len(kept.messages) == 2
    if template is TEMPLATE:
        # A later turn reads the last answer's end, or all of it where it has special tokens, and the new question.
        assert max(computed[1:]) <= 8 + 1 + 4 + 3 and sum(prompts[:4]) > 60
    else:
        assert max(prompts) == 7


def test_a_stopped_answer_is_kept_as_far_as_it_came_and_spoils_nothing():
    model, tokenizer = tiny_model(tiny_config("v3", pad_token_id=2)).eval(), tiny_tokenizer()
    whole = Conversation(model, tokenizer, max_new_tokens=8, do_sample=False).ask(QUESTIONS[0])
    pieces = []
    stopped = Conversation(model, tokenizer, max_new_tokens=8, do_sample=False)
    part = stopped.ask(QUESTIONS[0], show=pieces.append, stopped=lambda: len(pieces) == 2)
    assert whole.startswith(part) and 2 <= len(part.split()) < len(whole.split())
    assert stopped.messages[-1] == {"role": "assistant", "content": part}
    again = Conversation(model, tokenizer, max_new_tokens=8, do_sample=False)
    again.messages = stopped.messages
    assert stopped.ask(QUESTIONS[1]) == again.ask(QUESTIONS[1])


def test_an_answer_that_fails_leaves_the_conversation_usable():
    model, tokenizer = tiny_model(tiny_config("v3", pad_token_id=2)).eval(), tiny_tokenizer()

    def fail(piece):
        raise KeyboardInterrupt

    conversation = Conversation(model, tokenizer, max_new_tokens=8, do_sample=False)
    first = conversation.ask(QUESTIONS[0])
    with pytest.raises(KeyboardInterrupt):
        conversation.ask(QUESTIONS[1], show=fail)
    assert [message["content"] for message in conversation.messages] == [QUESTIONS[0], first]
    fresh = Conversation(model, tokenizer, max_new_tokens=8, do_sample=False)
    assert fresh.ask(QUESTIONS[0]) == first
    assert conversation.ask(QUESTIONS[2]) == fresh.ask(QUESTIONS[2])


def test_each_line_of_a_pipe_is_a_message_and_only_answers_come_back(base):
    one, other = answers(base, QUESTIONS[0], "", QUESTIONS[1])
    assert one and other and one != other
    assert answers(base, QUESTIONS[0]) == [one]
    assert answers(base, QUESTIONS[1]) != [other], "the second answer does not depend on the first question"


def test_commands_change_the_history(base):
    one, other = answers(base, *QUESTIONS[:2])
    assert answers(base, QUESTIONS[2], "/undo", *QUESTIONS[:2])[1:] == [one, other]
    assert answers(base, QUESTIONS[2], "/new", *QUESTIONS[:2])[1:] == [one, other]
    assert answers(base, *QUESTIONS[:2], "/retry") == [one, other, other]
    assert answers(base, QUESTIONS[0], "/exit", QUESTIONS[1]) == [one]


def test_a_seed_repeats_a_conversation_and_retry_samples_anew(base):
    options = ("--temperature", "2", "--top-p", "1", "--seed", "5")
    first = answers(base, QUESTIONS[0], "/retry", options=options)
    assert answers(base, QUESTIONS[0], "/retry", options=options) == first
    assert first[0] != first[1]


def test_a_system_message_stays_through_new_conversations(base, tmp_path):
    file = tmp_path / "said.jsonl"
    options = ("--greedy", "--system", "w9 w9")
    one, again = answers(base, QUESTIONS[0], "/new", QUESTIONS[0], f"/save {file}", options=options)
    assert one == again != answers(base, QUESTIONS[0])[0]
    row = json.loads(file.read_text())
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    # The saved file is a row that fine-tuning reads.
    ids, labels = encode(row, tiny_tokenizer(), 99)
    learned = tiny_tokenizer().decode([label for label in labels if label != -100], skip_special_tokens=True)
    assert learned == one and len(ids) == len(labels)


def test_what_a_command_cannot_do_is_said_and_the_conversation_goes_on(base, tmp_path):
    taken = tmp_path / "thesis.tex"
    taken.write_text("mine")
    lines = ["/undo", "/dance", "/save", f"/save {tmp_path / 'new'}", QUESTIONS[0], f"/save {taken}", QUESTIONS[1]]
    result = talk(*lines, options=("--greedy",))(base)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2
    for said in ("nothing was asked yet", "/dance is not a command", "needs the name of a file", "exists"):
        assert said in result.stderr
    assert taken.read_text() == "mine" and not (tmp_path / "new").exists()


def test_a_full_context_is_said_before_anything_is_lost(tmp_path):
    base = tiny_base(tmp_path / "base", max_position_embeddings=16)
    result = talk(QUESTIONS[0], QUESTIONS[1], "/new", QUESTIONS[2], options=("--greedy",))(base)
    assert len(result.stdout.splitlines()) == 2
    assert "tokens, and the model's context is 16" in result.stderr


def press_ctrl_c(monkeypatch, at):
    """Let the terminal's user press Ctrl-C when the answer's pieces of these numbers are shown."""
    shown = []

    def show(self, piece):
        sys.stdout.write(piece)
        shown.append(piece)
        if len(shown) in at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat_module._Terminal, "_show", show)


def test_ctrl_c_stops_an_answer_but_not_the_chat(base, monkeypatch):
    whole, _ = answers(base, *QUESTIONS[:2])
    press_ctrl_c(monkeypatch, at={1})
    before = signal.getsignal(signal.SIGINT)
    part, second = answers(base, *QUESTIONS[:2])
    assert whole.startswith(part.strip()) and len(part) < len(whole) and second
    assert signal.getsignal(signal.SIGINT) is before


class Keyboard:
    """A terminal's user who types these lines; an exception is a key."""

    def __init__(self, *typed):
        self.typed = list(typed)

    def isatty(self):
        return True

    def __call__(self, prompt):
        typed = self.typed.pop(0)
        if isinstance(typed, BaseException):
            raise typed
        return typed


def test_at_a_terminal_ctrl_c_stays_ctrl_d_leaves_and_speed_is_shown(base, monkeypatch, capsys):
    keyboard = Keyboard(KeyboardInterrupt(), QUESTIONS[0], QUESTIONS[1], EOFError())
    monkeypatch.setattr(sys, "stdin", keyboard)
    monkeypatch.setattr("builtins.input", keyboard)
    press_ctrl_c(monkeypatch, at={1, 2})  # twice, in the first answer: for who does not want to wait
    chat_module.chat(base, greedy=True, max_new_tokens=6)
    out, err = capsys.readouterr()
    assert not keyboard.typed
    assert "Ctrl-D leaves" in err and "neither question nor answer is kept" in err
    assert "6 tokens, " in err and " a second; " in err
    # The first question is forgotten.
    assert out.splitlines()[-1].endswith(answers(base, QUESTIONS[1])[0])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--greedy", "--top-p", "0.5"], "--greedy takes the likeliest token: leave --temperature and --top-p out"),
        (["--temperature", "0"], "--temperature is 0.0: it is above 0"),
        (["--top-p", "1.5"], "--top-p is 1.5"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--adapter", "/nowhere"], "cannot put adapter '/nowhere' on the model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_end_in_one_line(base, options, message):
    result = CliRunner().invoke(app, ["chat", str(base), *options], input="w1\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr.splitlines()[-1]


def test_a_tokenizer_without_a_template_cannot_chat(base):
    model = tiny_model(tiny_config("v3", pad_token_id=2))
    with pytest.raises(UserError, match="no chat template, so there is no telling how to talk to it"):
        Conversation(model, tiny_tokenizer(None))


def test_a_template_that_refuses_the_system_message_is_named():
    model = tiny_model(tiny_config("v3", pad_token_id=2))
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    with pytest.raises(UserError, match="the chat template refuses this: no system here"):
        Conversation(model, tiny_tokenizer(strict), system="w1")


@pytest.mark.parametrize("is_special", [True, False])
def test_a_special_token_that_ends_a_turn_ends_an_answer_like_eos(is_special):
    """As in ChatML, whose turns do not end with EOS."""
    model = tiny_model(tiny_config("v3", pad_token_id=2))
    tokenizer = tiny_tokenizer(TEMPLATE.replace("{{ eos_token }}", "<user>"))
    if is_special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
    end = tokenizer.convert_tokens_to_ids("<user>")
    assert stop_tokens(model, tokenizer) == ([1, end] if is_special else [1])
