"""What a checkpoint of a spread model must have to be resumed from; that it resumes is in tests/model."""

from types import SimpleNamespace

import pytest

from modeling_deepseek_moe.finetune import SaveSharded
from modeling_deepseek_moe.finetune.errors import UserError


@pytest.mark.parametrize("files", [[], ["rank_1.pt"], ["complete", "rank_0.pt"]], ids=["none", "unfinished", "of one"])
def test_a_checkpoint_whose_state_is_not_whole_is_refused_by_name(files, tmp_path):
    folder = tmp_path / "checkpoint-2" / "sharded_state"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).touch()
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=1, world_size=2)
    with pytest.raises(
        UserError, match="checkpoint-2: its sharded_state is not whole or of fewer processes than the 2"
    ):
        SaveSharded().on_train_begin(args, SimpleNamespace(global_step=2), None)


def test_a_run_from_the_beginning_needs_no_checkpoint(tmp_path):
    SaveSharded().on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=0), None)
