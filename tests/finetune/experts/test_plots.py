"""Pictures: what a reader sees in them."""

import pytest
import torch
from matplotlib.image import imread

from modeling_deepseek_moe.finetune.experts.plots import expert_map


def count_pixels(path, color):
    """Pixels of an RGB color, up to the rounding of 8 bits."""
    picture = torch.from_numpy(imread(path)[..., :3].copy())
    return int(((picture - torch.tensor(color)).abs().amax(dim=-1) < 0.01).sum())


YELLOW, GREY, PALE, DARK_RED = (0.993, 0.906, 0.144), (0.8, 0.8, 0.8), (0.966, 0.968, 0.969), (0.404, 0.0, 0.122)


def test_maps_of_shares_have_one_scale_and_unused_experts_are_grey(tmp_path):
    high, low = torch.tensor([[0.8, 0.1, 0.1, 0.0]]), torch.tensor([[0.6, 0.2, 0.1, 0.1]])
    for name, shares in {"twice": {"a": high, "b": high}, "lower": {"a": high, "b": low}}.items():
        expert_map(shares, [3], tmp_path / name)
    # The brightest color is the common maximum's; the color bars have a little of it.
    assert count_pixels(tmp_path / "lower", YELLOW) < 0.6 * count_pixels(tmp_path / "twice", YELLOW)
    assert 0 < count_pixels(tmp_path / "lower", GREY) < 0.6 * count_pixels(tmp_path / "twice", GREY)


def test_the_map_of_a_difference_has_a_scale_of_its_own_around_zero(tmp_path):
    share = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    expert_map({"a": share}, [3], tmp_path / "without")
    expert_map({"a": share}, [3], tmp_path / "same", {"a - a": share - share})
    area = imread(tmp_path / "without")[..., 0].size
    assert count_pixels(tmp_path / "without", PALE) < 0.01 * area
    assert count_pixels(tmp_path / "same", PALE) > 0.4 * area
    small = torch.tensor([[0.001, -0.001, 0.0, 0.0]])
    expert_map({"a": share}, [3], tmp_path / "small", {"difference": 100 * small})
    assert count_pixels(tmp_path / "small", DARK_RED) > 0.1 * area, "the largest difference has the strongest color"
    expert_map({"a": share}, [3], tmp_path / "chance", {"difference": small})
    assert count_pixels(tmp_path / "chance", DARK_RED) < 0.01 * area, "a difference of chance's size has not"


@pytest.mark.parametrize("rows, experts", [(58, 256), (1, 1)], ids=["58 layers of 256 experts", "one of one"])
def test_pictures_of_all_sizes_stay_viewable(tmp_path, rows, experts):
    share = torch.rand(rows, experts, generator=torch.Generator().manual_seed(0))
    expert_map(
        {"a $\\name{$ of_any kind": share / share.sum(1, keepdim=True)}, list(range(rows)), tmp_path / "map.png"
    )
    height, width, _ = imread(tmp_path / "map.png").shape
    assert 500 < width < 2000 and 200 < height < 1200
