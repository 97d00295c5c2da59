"""Calls a verb on a disk of its own that is full from the start, or gets full before the results are written.

    unshare -Urm python tests/support/full_disk_of_verbs.py FOLDER MOMENT ARGUMENT...

mounts a disk at FOLDER, in which the arguments name the output, and calls the verb twice: on the full disk (MOMENT is
"start" or "results"), and when there is room again. Prints a line of JSON: of both calls the exit code and what came
on stderr, and what lay there between them.
"""

import json
import os
import sys
from pathlib import Path

from full_disk import fill, mount
from typer.testing import CliRunner

from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.finetune.evaluate import measure
from modeling_deepseek_moe.finetune.experts import report, score_data

# What each verb does last.
LAST = ((measure, "write_text"), (report, "_draw"), (score_data, "write_text"))


def main(folder: Path, moment: str, arguments: list[str]) -> None:
    mount(folder, 4)
    originals = [getattr(module, name) for module, name in LAST]
    if moment == "start":
        fill(folder)
    else:
        for (module, name), original in zip(LAST, originals, strict=True):
            setattr(module, name, lambda *args, original=original, **kwargs: (fill(folder), original(*args, **kwargs)))
    calls = [CliRunner().invoke(app, arguments)]
    for (module, name), original in zip(LAST, originals, strict=True):
        setattr(module, name, original)
    os.remove(folder / "ballast")
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    calls.append(CliRunner().invoke(app, arguments))
    found = [{"exit": call.exit_code, "error": repr(call.exception), "stderr": call.stderr} for call in calls]
    print("\n" + json.dumps({"calls": found, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
