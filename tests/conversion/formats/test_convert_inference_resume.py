"""Conversions to and from DeepSeek's model-parallel files that are killed: the same call ends with the same bytes."""

import random
import shutil
from pathlib import Path

import pytest
from convert_folders import contents, fp8_folder
from convert_kills import KilledConversions, killed_at

from modeling_deepseek_moe.conversion import convert

SIZES = {"intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 8}
SIZES |= dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> list[tuple[Path, str, dict]]:
    """There, back, and from two ranks to one."""
    root = tmp_path_factory.mktemp("jobs")
    source = fp8_folder(root / "source", **SIZES)
    convert(source, root / "ranks", "deepseek-inference", mp=2)
    return [
        (source, "deepseek-inference", {"mp": 2}),
        (root / "ranks", "deepseek_v3", {}),
        (root / "ranks", "deepseek-inference", {"mp": 1}),
    ]


def kill_everywhere(jobs, tmp_path: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    with KilledConversions() as conversions:
        for i, (source, to, options) in enumerate(jobs):
            before = contents(source)
            with killed_at(None) as operations:
                convert(source, tmp_path / f"whole{i}", to, **options)
            expected = contents(tmp_path / f"whole{i}")
            for kill in range(kills):
                target = tmp_path / f"{i}-{kill}"
                # The first time while config.json, which comes last, gets its name.
                event = chance.randrange(len(operations)) if kill else len(operations) - 2
                assert conversions.run(source, target, to, event=event, **options) == 9
                found = contents(target) if target.exists() else {}
                whole = {name: data for name, data in found.items() if not name.endswith(".part")}
                assert whole.items() <= expected.items()
                assert "config.json" not in whole or whole == expected
                convert(source, target, to, **options)
                assert contents(target) == expected
                shutil.rmtree(target)
            assert contents(source) == before


def test_three_kills_at_random_disk_operations_leave_no_corrupt_result_in_any_direction(jobs, tmp_path):
    kill_everywhere(jobs, tmp_path, kills=3, seed=0)


@pytest.mark.slow
def test_sixty_kills_at_random_disk_operations_leave_no_corrupt_result_in_any_direction(jobs, tmp_path):
    kill_everywhere(jobs, tmp_path, kills=20, seed=1)


def test_a_target_of_another_number_of_ranks_is_refused(jobs, tmp_path):
    source = jobs[0][0]
    convert(source, tmp_path / "target", "deepseek-inference", mp=2)
    before = contents(tmp_path / "target")
    with pytest.raises(ValueError, match="target belongs to another conversion"):
        convert(source, tmp_path / "target", "deepseek-inference", mp=1)
    assert contents(tmp_path / "target") == before
