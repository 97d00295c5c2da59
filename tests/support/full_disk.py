"""Runs a recipe on a disk of its own that gets full at a chosen moment.

    unshare -Urm python tests/support/full_disk.py VALUES.json FOLDER MEGABYTES MOMENT

mounts a disk of so many MB at FOLDER, where the run's folder lies, and fills it up at MOMENT: "rows" (before rows are
tokenized), "last row" (when all are), "measure" (before the first measurement), "checkpoint" (before the second one)
or "results". Then it gives the room back and runs the same recipe again. Prints a line of JSON: the error, what was
left in the run's folder, and the second run's summary.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from modeling_deepseek_moe.finetune.data import rows
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run as train


def fill(folder: Path) -> None:
    """Leaves no room on a disk."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            pass


def filled(folder: Path, function):
    """The function, called on a disk without room."""

    def call(*args, **kwargs):
        fill(folder)
        return function(*args, **kwargs)

    return call


def mount(folder: Path, megabytes: int) -> None:
    """Makes a folder a disk of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)


def main(values: Path, folder: Path, megabytes: int, moment: str) -> None:
    mount(folder, megabytes)
    recipe = make_recipe({**json.loads(values.read_text()), "output_dir": str(folder / "run")})
    trainer = train.FineTuner
    real_save, saves = trainer._save_checkpoint, []

    def save_checkpoint(self, *args, **kwargs):
        saves.append(self.state.global_step)
        return (filled(folder, real_save) if len(saves) == 2 else real_save)(self, *args, **kwargs)

    places = {
        "rows": (train, "recipe_rows", filled(folder, train.recipe_rows)),
        "last row": (rows, "write_text", filled(folder, rows.write_text)),
        "measure": (train, "eval_loss_before", filled(folder, train.eval_loss_before)),
        "checkpoint": (trainer, "_save_checkpoint", save_checkpoint),
        "results": (train, "save", filled(folder, train.save)),
    }
    owner, name, replacement = places[moment]
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    error = None
    try:
        train.run(recipe)
    except UserError as caught:
        error = str(caught)
    setattr(owner, name, original)
    os.remove(folder / "ballast")
    left = sorted(path.name for path in folder.glob("run/*"))
    print("\n" + json.dumps({"error": error, "left": left, "summary": train.run(recipe)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
