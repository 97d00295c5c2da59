"""Upcycling that is killed: nothing looks finished before it is, and the same call ends with the same bytes."""

import random

import pytest
from convert_folders import contents
from convert_kills import KilledConversions, killed_at
from dense_folders import dense_folder, upcycled

from modeling_deepseek_moe.conversion import ConversionError, UpcycleOptions


def test_four_kills_at_random_disk_operations_leave_no_corrupt_result(tmp_path):
    llama = dense_folder(tmp_path / "llama")
    with killed_at(None) as operations:
        upcycled(llama, tmp_path / "whole")
    expected, chance = contents(tmp_path / "whole"), random.Random(0)
    fields = {"experts": 8, "shared_experts": 2, "top_k": 3}
    with KilledConversions() as conversions:
        for i in range(4):
            target = tmp_path / str(i)
            signal = conversions.run(llama, target, "upcycle", event=chance.randrange(len(operations)), upcycle=fields)
            assert signal == 9
            if (target / "config.json").exists():
                assert {k: v for k, v in contents(target).items() if not k.endswith(".part")} == expected
            upcycled(llama, target)
            assert contents(target) == expected
    with pytest.raises(ConversionError, match="belongs to another conversion"):
        upcycled(llama, tmp_path / "whole", upcycle=UpcycleOptions(8, 2, 4))
