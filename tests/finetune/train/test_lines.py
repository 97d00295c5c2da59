"""What is shown while a run trains."""

import os
import pty
import re
import subprocess
import sys

import pytest
import yaml
from tiny_run import stopped_at, tiny_values

from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.train.lines import duration

LINE = re.compile(r"step (\d)/6  loss \d+\.\d{3}  lr \d\.\de-\d\d  MaxVio \d+\.\d\d  [\d,]+ tokens/s(  \d+ s left)?")


def lines_of(shown):
    return [line for line in shown.splitlines() if line.startswith("step ")]


def test_a_log_is_one_short_line(go, capsys):
    go(**{"training.eval_strategy": "steps", "training.eval_steps": 3})
    shown = capsys.readouterr()
    lines = lines_of(shown.out)
    logs, evaluations = (
        [line for line in lines if "held-out" not in line],
        [line for line in lines if "held-out" in line],
    )
    assert [LINE.fullmatch(line)[1] for line in logs] == list("123456")
    assert "left" in logs[0] and "left" not in logs[-1]
    assert [re.fullmatch(r"step (\d)/6  held-out loss \d+\.\d{3}", line)[1] for line in evaluations] == list("36")
    assert max(map(len, lines)) < 80
    assert "{'" not in shown.out + shown.err


def test_a_run_that_goes_on_says_from_where(go, capsys):
    with stopped_at(3):
        go()
    capsys.readouterr()
    go()
    shown = capsys.readouterr().out
    assert "resuming from checkpoint-2: step 2 of 6 is made\n" in shown
    assert [LINE.fullmatch(line)[1] for line in lines_of(shown)] == list("3456")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"training.learning_rate": 0.5}, "its `training.learning_rate` is 0.01, not 0.5"),
        ({"lora.use_rslora": True}, "this one's recipe alone has `lora.use_rslora`, True"),
        ({"lora.r": 2}, "its `lora.r` is 4, not 2"),
    ],
    ids=["value", "key more", "other section"],
)
def test_what_differs_from_another_run_is_the_key(go, change, message):
    with stopped_at(1):
        go()
    with pytest.raises(UserError) as caught:
        go(**change)
    assert f"holds another run ({message})" in str(caught.value)


@pytest.mark.parametrize(
    "seconds, said", [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5_900, "98 min"), (12_000, "3 h 20 min")]
)
def test_times_are_said_as_one_reads_them(seconds, said):
    assert duration(seconds) == said


@pytest.mark.slow
def test_a_terminal_has_bars_of_ours_and_nothing_is_drawn_under_the_closing_lines(tmp_path, base):
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(tiny_values(tmp_path, base, **{"training.disable_tqdm": False}))
    )
    main, other = pty.openpty()
    command = [sys.executable, "-m", "modeling_deepseek_moe.cli", "finetune", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment, cwd=tmp_path)
    os.close(other)
    shown = b""
    try:
        while piece := os.read(main, 1 << 16):
            shown += piece
    except OSError:  # Linux's end of a terminal that nobody writes to any more
        pass
    assert process.wait() == 0, shown.decode()[-2000:]
    shown = re.sub(r"\x1b\[[\d;]*m", "", shown.decode())
    assert all(f"\r\x1b[2Kstep {step}/6  loss " in shown for step in range(1, 6)), "a line takes the bar's place"
    assert "tokenizing rows.jsonl" in shown and "training" in shown and "Generating" not in shown
    after = shown.partition("publish it: ")[2]
    assert after.rstrip() == f"deepseek-moe push {tmp_path}/run --to USER/NAME"
