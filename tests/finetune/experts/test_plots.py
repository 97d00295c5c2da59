"""Pictures: what a reader sees in them."""

import math

import pytest
import torch
from matplotlib.image import imread

from modeling_deepseek_moe.finetune.experts.plots import expert_map, loss_curve


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


def test_a_layer_that_did_not_run_is_no_row_of_unused_experts(tmp_path):
    shares = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 0.0]])
    expert_map({"share": shares}, [3, 4], tmp_path / "idle")
    expert_map({"share": shares[:1]}, [3], tmp_path / "one layer")
    assert count_pixels(tmp_path / "idle", GREY) < 200, "of letters alone"
    assert count_pixels(tmp_path / "idle", YELLOW) == count_pixels(tmp_path / "one layer", YELLOW)
    expert_map({"share": shares[1:]}, [4], tmp_path / "nothing ran")
    assert count_pixels(tmp_path / "nothing ran", GREY) > 1000


def edges(path):
    """Pixels other than white in the outermost two rows and columns, where a cut label would be."""
    dark = torch.from_numpy(imread(path)[..., :3].copy()).amin(dim=-1) < 0.99
    return int(dark[:2].sum() + dark[-2:].sum() + dark[:, :2].sum() + dark[:, -2:].sum())


def test_long_titles_and_labels_are_whole(tmp_path):
    share, long = torch.tensor([[0.5, 0.5]]), "a data set with a name that is far longer than its map is wide " * 4
    expert_map(
        {long: share, f"{long}_{'x' * 300}": share}, [10**9], tmp_path / "map", {f"{long} - other": share - 0.5}
    )
    history = [{"step": step, "loss": 1e6 + step, "num_input_tokens_seen": step * 10**9} for step in (1, 100_000)]
    loss_curve(history, tmp_path / "curve", 2e6)
    assert edges(tmp_path / "map") == edges(tmp_path / "curve") == 0


def test_the_loss_curve_has_a_second_scale_where_tokens_were_counted(tmp_path):
    history = [{"step": step, "loss": 3 - step / 10} for step in range(1, 9)]
    loss_curve(history, tmp_path / "steps", 3.0)
    loss_curve([row | {"num_input_tokens_seen": 1000 * row["step"]} for row in history], tmp_path / "tokens", 3.0)
    assert imread(tmp_path / "tokens").shape[0] > imread(tmp_path / "steps").shape[0] + 20


def test_a_single_loss_is_a_point_that_can_be_seen(tmp_path):
    blue = (0.122, 0.467, 0.706)
    loss_curve([{"step": 1, "loss": 3.0}], tmp_path / "one")
    loss_curve([{"step": 1, "loss": math.nan}], tmp_path / "none")
    assert count_pixels(tmp_path / "one", blue) > count_pixels(tmp_path / "none", blue)
