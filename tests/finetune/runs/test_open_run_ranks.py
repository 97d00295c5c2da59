"""Processes of one run open its folder together: the main one does it, and all get what it found, or its error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from places import SUPPORT
from tiny_run import write_jsonl

from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.runs.folder import open_run

RANKS, TIMES = (3, 4, 8), 60


def one_of(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    store = f"file://{folder}/store-{ranks}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    found = []
    for time in range(TIMES):
        values = {"model": "m", "data": str(folder / "rows.jsonl"), "output_dir": str(folder / f"{ranks}-{time // 2}")}
        try:
            # Every second time it goes on; every sixth time it is another run.
            with open_run(make_recipe({**values, "seed": 7 if time % 6 == 5 else 42})) as opened:
                found.append([str(opened.folder), opened.is_new])
                opened.keep()
        except UserError as error:
            found.append(str(error))
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_jsonl(folder / "rows.jsonl", [{"text": "w1"}])
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=600, env=environment)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
def test_all_ranks_find_the_same_and_none_is_in_the_way_of_another(folder, ranks):
    first, *others = (json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks))
    assert all(other == first for other in others)
    for time, found in enumerate(first):
        if time % 6 == 5:
            assert "holds another run (its `seed` is 42, not 7)" in found
        else:
            assert found == [str(folder / f"{ranks}-{time // 2}"), time % 2 == 0]
    assert not list(folder.rglob("*.aside")) and not list(folder.rglob("run.lock"))


if __name__ == "__main__":
    # Forked where that is safe, from a process that has computed nothing yet: importing is what takes the time.
    method = "fork" if sys.platform == "linux" else "spawn"
    for count in RANKS:
        arguments = (count, Path(sys.argv[1]))
        torch.multiprocessing.start_processes(one_of, args=arguments, nprocs=count, start_method=method)
