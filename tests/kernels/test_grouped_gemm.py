"""The experts' Triton kernels, interpreted on CPU, against plain PyTorch in float64."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from modeling_deepseek_moe.kernels.triton import gate_up, grouped_gemm, pair_sorting, reference, weight_gradient
from modeling_deepseek_moe.kernels.triton.grouped_gemm import Tiles, product_tiles, row_tiles
from modeling_deepseek_moe.kernels.triton.weight_gradient import weight_gradient_tiles

EXPERTS, TOP_K, RANK = 4, 2, 8
HIDDEN, WIDTH = 48, 80  # multiples of 16, and of no tile: the last step of a sum and the last columns are ragged
TILES = Tiles(16, 64, 32, 4, 2)  # small, so that the interpreter passes over several
WIDE, NARROW = TILES._replace(columns=128), TILES._replace(columns=32)

# Sums of at most 160 products in float32, each rounded to 2^-24 of a partial sum that can pass the result.
FLOAT32 = 5e-6
# One rounding of a float32 sum to the nearest number of 11 and of 8 binary places.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}


def zipf(tokens: int, top_k: int = TOP_K) -> torch.Tensor:
    """Different experts for each token, the most popular several times as often as the last: the skew of routers."""
    popularity = 1 / torch.arange(1.0, EXPERTS + 1)
    return torch.multinomial(popularity.expand(tokens, -1), top_k, generator=torch.Generator().manual_seed(tokens))


def without_expert_2(tokens: int) -> torch.Tensor:
    return torch.tensor([0, 1, 3])[zipf(tokens) % 3]


def some_elsewhere(tokens: int) -> torch.Tensor:
    ids = zipf(tokens)
    ids[::3, 0] = EXPERTS
    return ids


ROUTINGS = {
    "skewed, with ragged last tiles": zipf(25),
    "one token": zipf(1),
    "an empty expert": without_expert_2(9),
    "every token to the last expert": torch.full((10, TOP_K), EXPERTS - 1),  # 2 tiles, the second one ragged
    "tiles exactly full": torch.arange(EXPERTS * 16).view(-1, TOP_K) % EXPERTS,
    "some served elsewhere": some_elsewhere(11),
    "all served elsewhere": torch.full((3, TOP_K), EXPERTS),
}


class Case:
    """Random tensors of one routing; what the launchers give and what the references give for them in float64."""

    def __init__(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32):
        self.generator, self.dtype = torch.Generator().manual_seed(1), dtype
        self.ids, self.pairs = ids, ids.numel()
        self.rows = pair_sorting.sort_pairs(ids, EXPERTS)
        self.served = int(self.rows.ends[-1])
        self.served_pairs = self.rows.pairs[: self.served].long()
        self.x = self.random(len(ids), HIDDEN)
        self.w = torch.rand(self.pairs, generator=self.generator)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def low(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Strided as `LowRank` lays out B: the experts of one rank are neighbours."""
        return self.random(self.pairs, RANK), self.random(RANK, EXPERTS, width).transpose(0, 1)

    def assert_close(self, actual, expected, by_pair: bool = False, tolerance: float | None = None) -> None:
        """Of the rows that are computed, relative to the largest number there."""
        which = self.served_pairs if by_pair else slice(self.served)
        actual, expected = actual[which], expected[which]
        assert actual.dtype != torch.float64
        assert_all_close(actual, expected, tolerance or ROUNDING.get(self.dtype, FLOAT32))


def assert_all_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    bound = (tolerance + FLOAT32) * expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


def doubled(value):
    """Floating-point tensors in float64, in tuples too."""
    if isinstance(value, tuple) and not isinstance(value, pair_sorting.SortedPairs):
        return tuple(map(doubled, value))
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_floating else value


def both(launcher, counterpart, *arguments, config: Tiles | None = TILES, **options):
    """What the launcher and, in float64, its counterpart give."""
    exact = {name: torch.float64 if name == "dtype" else doubled(value) for name, value in options.items()}
    return launcher(*arguments, config=config, **options), counterpart(*map(doubled, arguments), **exact)


def check_gate_up(case: Case, adapted: bool = True, config: Tiles | None = WIDE) -> None:
    weight = case.random(EXPERTS, 2 * WIDTH, HIDDEN)
    low = case.low(2 * WIDTH) if adapted else None
    arguments = (case.x, weight, case.rows, TOP_K, low)
    launcher, counterpart = gate_up.gate_up_product, reference.gate_up_product
    (h, saved), (exact_h, exact_saved) = both(launcher, counterpart, *arguments, save=True, config=config)
    case.assert_close(saved, exact_saved)
    case.assert_close(h, exact_h, tolerance=3 * ROUNDING.get(case.dtype, FLOAT32))  # gate and up are rounded before
    assert torch.equal(launcher(*arguments, config=config)[0][: case.served], h[: case.served])


def check_gate_backward(case: Case, adapted: bool = True, config: Tiles | None = NARROW) -> None:
    weight, saved = case.random(EXPERTS, HIDDEN, WIDTH), case.random(case.pairs, 2 * WIDTH)
    arguments = (case.x, weight, saved, case.w, case.rows, TOP_K, case.low(WIDTH) if adapted else None)
    launcher, counterpart = gate_up.gate_backward, reference.gate_backward
    actual, expected = both(launcher, counterpart, *arguments, save_h=True, config=config)
    case.assert_close(actual[0], expected[0])
    case.assert_close(actual[1], expected[1])
    assert_all_close(actual[2], expected[2], FLOAT32)  # of all pairs, in float32 whatever the others are


def check_rows_product(case: Case, form: str, config: Tiles | None = TILES) -> None:
    launcher, counterpart = grouped_gemm.rows_product, reference.rows_product
    by_pair = {"scatter": True, "row_weights": case.w, "low": case.low(HIDDEN)}
    rank_major = case.random(RANK, EXPERTS, HIDDEN).transpose(0, 1)
    arguments, options = {
        "down": (
            (case.random(case.pairs, WIDTH), case.random(EXPERTS, HIDDEN, WIDTH)),
            by_pair | {"transposed": True},
        ),
        "input gradient": ((case.random(case.pairs, WIDTH), case.random(EXPERTS, WIDTH, HIDDEN)), by_pair),
        "factor A": ((case.x, case.random(EXPERTS, RANK, HIDDEN)), {"transposed": True, "gather": TOP_K}),
        "factor B": ((case.x, rank_major), {"transposed": True, "gather": TOP_K}),
    }[form]
    options = {"transposed": False} | options
    actual, expected = both(launcher, counterpart, *arguments, case.rows, config=config, **options)
    case.assert_close(actual, expected, by_pair="scatter" in options)


def check_weight_gradient(case: Case, form: str, config: Tiles | None = TILES) -> None:
    launcher, counterpart = weight_gradient.weight_gradient, reference.weight_gradient
    sorted_rows, t = case.random(case.pairs, WIDTH), case.random(case.pairs, RANK)
    arguments, options = {
        "gate and up": ((sorted_rows, case.x), {"gather_right": TOP_K}),
        "down": ((case.x, sorted_rows), {"gather_left": TOP_K}),
        "factor of gate and up": ((t, sorted_rows), {}),
        "factor of down": ((t, case.x), {"gather_right": TOP_K, "row_weights": case.w}),
        "wide factor of down": ((sorted_rows, t), {"row_weights": case.w}),
    }[form]
    options["dtype"] = case.dtype
    actual, expected = both(launcher, counterpart, *arguments, case.rows, config=config, **options)
    assert_all_close(actual, expected, ROUNDING.get(case.dtype, FLOAT32))


@pytest.mark.parametrize("routing", [*ROUTINGS, "more ids than one step takes"])
def test_pairs_are_in_the_order_of_their_experts_and_then_of_their_numbers(routing):
    ids = zipf(2100) if routing not in ROUTINGS else ROUTINGS[routing]
    actual, expected = (sort(ids, EXPERTS) for sort in (pair_sorting.sort_pairs, reference.sort_pairs))
    assert torch.equal(actual.pairs, expected.pairs)
    assert torch.equal(actual.ends, expected.ends)


def test_a_single_choice_may_be_a_column_of_a_wider_tensor():
    ids = zipf(9)[:, :1]
    actual, expected = (sort(ids, EXPERTS) for sort in (pair_sorting.sort_pairs, reference.sort_pairs))
    assert torch.equal(actual.pairs, expected.pairs) and torch.equal(actual.ends, expected.ends)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_rows_are_multiplied_by_the_weight_of_their_expert_alone(routing):
    case = Case(ROUTINGS[routing])
    check_rows_product(case, "down")
    check_weight_gradient(case, "gate and up")


@pytest.mark.parametrize("routing", ["skewed, with ragged last tiles", "one token", "some served elsewhere"])
def test_swiglu_and_its_gradient_are_those_of_the_products(routing):
    case = Case(ROUTINGS[routing])
    check_gate_up(case)
    check_gate_backward(case)


def test_swiglu_and_its_gradient_need_no_adapters():
    case = Case(zipf(1))
    check_gate_up(case, adapted=False)
    check_gate_backward(case, adapted=False)


@pytest.mark.parametrize("form", ["input gradient", "factor A", "factor B"])
def test_rows_are_multiplied_by_weights_and_factors_of_any_layout(form):
    check_rows_product(Case(some_elsewhere(11)), form)


@pytest.mark.parametrize(
    "form", ["gate and up", "down", "factor of gate and up", "factor of down", "wide factor of down"]
)
def test_gradients_of_weights_and_factors_sum_over_each_experts_rows(form):
    check_weight_gradient(Case(without_expert_2(45)), form)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_half_precision_is_rounded_only_where_it_is_stored(dtype):
    """With the tiles that the launchers choose."""
    case = Case(zipf(12), dtype)
    check_gate_up(case, config=None)
    check_gate_backward(case, config=None)
    check_rows_product(case, "down", config=None)
    check_weight_gradient(case, "down", config=None)


def test_more_row_tiles_than_share_weight_columns_are_all_made():
    """Two groups of row tiles of one expert, the second one not full, on three tiles of columns."""
    tokens = 16 * (grouped_gemm.GROUP + 2) // TOP_K
    check_rows_product(Case(torch.full((tokens, TOP_K), 1)), "down", TILES._replace(columns=16))


def test_what_is_not_finite_stays_with_its_expert():
    """Neither rows too many of a tile nor pairs that another rank serves reach another expert's numbers."""
    ids = torch.tensor([[0, 1], [EXPERTS, EXPERTS], [3, 1], [1, 3]])
    case = Case(ids)
    case.x[0], case.x[1] = torch.nan, torch.inf  # the tokens of expert 0, and of nobody here
    weight = case.random(EXPERTS, HIDDEN, 2 * WIDTH)
    product = grouped_gemm.rows_product(case.x, weight, case.rows, transposed=False, gather=TOP_K, scatter=True)
    assert product.view(4, TOP_K, -1)[2:].isfinite().all()
    left = case.random(case.pairs, WIDTH)
    gradient = weight_gradient.weight_gradient(left, case.x, case.rows, gather_right=TOP_K, dtype=torch.float32)
    assert gradient.isfinite().flatten(1).all(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["its own dtype", "float32"])
def test_pairs_of_a_token_are_summed_without_those_served_elsewhere(dtype):
    ids = some_elsewhere(23)
    y = torch.randn(ids.numel(), HIDDEN, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(2))
    y[ids.flatten() == EXPERTS] = torch.nan
    actual = pair_sorting.sum_pairs(y, ids, EXPERTS, dtype)
    expected = reference.sum_pairs(y, ids, EXPERTS, dtype)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)  # two numbers are added, and rounded once


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("height", [16, 128])
def test_the_grid_has_a_program_for_every_tile_of_rows(routing, height):
    ids = ROUTINGS[routing]
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS + 1)[:EXPERTS]
    needed = (-(-counts // height)).sum().item()
    assert needed <= row_tiles(ids.numel(), EXPERTS, height) <= ids.numel()


def test_the_grid_is_no_larger_than_the_worst_routing_needs():
    """One row more than full tiles for each expert."""
    counts = [1 + 32, 1, 1 + 16, 1]
    assert row_tiles(sum(counts), EXPERTS, 16) == sum(-(-count // 16) for count in counts)


@pytest.mark.parametrize("room", [99, 163, 227], ids=["RTX", "A100", "H100"])
def test_tiles_have_room_in_shared_memory(room):
    """Of experts as wide as V3's, in training, and as few as in decoding."""
    for pairs in (8, 2048, 4096 * 8, 16384 * 8):
        for itemsize in (2, 4):
            chosen = [product_tiles(pairs, 256, width, itemsize, room * 1024) for width in (16, 256, 7168)]
            chosen += [weight_gradient_tiles(pairs, 256, 4096, width, itemsize, room * 1024) for width in (16, 7168)]
            for tiles in chosen:
                assert tiles.stages >= 2, tiles
                assert tiles.stages * (tiles.rows + tiles.columns) * tiles.depth * itemsize <= room * 1024, tiles


def test_no_row_tile_is_twice_as_high_as_an_experts_share():
    assert [product_tiles(256 * rows, 256, 7168, 2, 227 * 1024).rows for rows in (1, 17, 60, 65, 512)] == [
        16,
        32,
        64,
        128,
        128,
    ]
