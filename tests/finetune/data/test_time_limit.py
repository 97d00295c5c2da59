"""Chat templates that never end, or compute what nobody needs: refused by name, whatever is done with bad rows."""

import signal
import threading

import pytest
from tiny_run import TEMPLATE, tiny_tokenizer

from modeling_deepseek_moe.finetune.data import templates
from modeling_deepseek_moe.finetune.data.templates import check_template, render_chat
from modeling_deepseek_moe.finetune.data.time_limit import TimeLimit, time_limit
from modeling_deepseek_moe.finetune.errors import UserError

QUESTION = [{"role": "user", "content": "w1"}]
ENDLESS = "".join(f"{{% for {i} in range(99999) %}}" for i in "ijk") + 3 * "{% endfor %}"


def test_a_loop_is_ended_when_it_has_computed_for_so_long():
    with pytest.raises(TimeLimit, match="did not come to an end in 0.2 seconds"), time_limit(0.2):
        while True:
            pass
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_what_ends_in_time_is_left_alone_and_code_that_catches_everything_is_not():
    with time_limit(60):
        assert sum(range(100)) == 4950
    caught = 0
    with pytest.raises(TimeLimit), time_limit(0.1):
        while caught < 3:
            try:
                while True:
                    pass
            except TimeLimit:
                caught += 1
        while True:
            pass


def test_another_thread_and_a_limit_within_a_limit_are_left_alone():
    done = []

    def elsewhere():
        with time_limit(60):
            done.append(signal.getitimer(signal.ITIMER_VIRTUAL)[0])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == [0.0]
    with time_limit(60):
        with time_limit(0.001):
            pass
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 1


@pytest.mark.parametrize(
    "template, message",
    [(ENDLESS, "did not come to an end in 0.5 seconds"), ("{{ 9**9**9 }}", "computes a power")],
    ids=["a loop", "a power"],
)
def test_a_template_without_end_is_refused_by_name(template, message, monkeypatch):
    monkeypatch.setattr(templates, "_SECONDS", 0.5)
    tokenizer = tiny_tokenizer(template)
    tokenizer.name_or_path = "somebody/model"
    for use in (render_chat, lambda tokenizer, messages: check_template(tokenizer)):
        with pytest.raises(UserError, match=f"the chat template of 'somebody/model' .*{message}"):
            use(tokenizer, QUESTION)


def test_a_sound_template_renders_as_the_tokenizer_does():
    tokenizer = tiny_tokenizer(TEMPLATE)
    expected = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer, QUESTION, prompt=True) == expected
    assert check_template(tokenizer) is None
