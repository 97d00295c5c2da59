"""Products in half precision on every kind of CPU: the rules, the tiles, and each path against the plain one."""

import pytest
import torch
from half_paths import PATHS, check
from machines import pretend, run_on_avx2
from places import ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_deepseek_moe import cpu_rules, half_products
from modeling_deepseek_moe.cpu_rules import Machine
from modeling_deepseek_moe.half_products import LinearThroughFloat32, product
from modeling_deepseek_moe.linear import call_linear

HALF = (torch.bfloat16, torch.float16)
KINDS = {
    "AVX2": Machine("AVX2", (), False, False),
    "AVX512-BF16": Machine("AVX512", (torch.bfloat16,), False, True),
    "AMX": Machine("AVX512", HALF, True, True),
}
HOLD = {
    ("AVX2", torch.bfloat16): {"THROUGH_FLOAT32", "A_ROW_AS_IT_IS"},
    ("AVX2", torch.float16): {"THROUGH_FLOAT32", "A_ROW_AS_IT_IS"},
    ("AVX512-BF16", torch.bfloat16): {"FEW_SIZES", "TWO_ROWS_FOR_ONE"},
    ("AVX512-BF16", torch.float16): {"THROUGH_FLOAT32", "A_ROW_AS_IT_IS"},
    ("AMX", torch.bfloat16): {"FEW_SIZES", "TWO_ROWS_FOR_ONE", "WEIGHT_FIRST"},
    ("AMX", torch.float16): {"FEW_SIZES", "TWO_ROWS_FOR_ONE"},
}


@pytest.fixture
def without_instructions(monkeypatch):
    pretend(monkeypatch)


@pytest.fixture(params=["without instructions", "with them"])
def either_kind(request, monkeypatch):
    pretend(monkeypatch, *(HALF if request.param == "with them" else ()))


@pytest.mark.parametrize("kind, dtype", HOLD, ids=str)
def test_each_kind_of_cpu_has_its_rules(kind, dtype):
    names = {name for name, rule in vars(cpu_rules).items() if isinstance(rule, cpu_rules.Rule)}
    assert {getattr(cpu_rules, name) for name in names} == set(cpu_rules.RULES)
    assert {n for n in names if getattr(cpu_rules, n).holds(KINDS[kind], dtype)} == HOLD[kind, dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rule_is_about_other_dtypes(kind, dtype):
    assert not any(rule.holds(KINDS[kind], dtype) for rule in cpu_rules.RULES)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_as_exact_as_the_plain_one_in_outputs_and_all_gradients(path, dtype, either_kind):
    check(path, dtype)


def test_every_path_without_avx512_in_a_process_of_its_own():
    """As this machine would be without AVX-512 and AMX; before, as it is."""
    assert cpu_rules.machine().capability == torch.backends.cpu.get_cpu_capability()
    printed = run_on_avx2(str(ROOT / "tests/support/half_paths.py"))
    assert printed.startswith("Machine(") and "half=()" in printed


def _laid_out(shape: tuple[int, int], is_transposed: bool) -> torch.Tensor:
    return torch.randn(shape[::-1]).bfloat16().mT if is_transposed else torch.randn(shape).bfloat16()


@pytest.mark.parametrize("layouts", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 70, 50), (3, 70, 50), (5, 70, 50), (70, 5, 50), (50, 70, 1), (40, 40, 40), (0, 7, 5), (4, 0, 5)],
    ids=str,
)
@pytest.mark.parametrize("tile", [1, 100, 2**19])
def test_tiles_of_any_size_and_layout_add_up_to_one_product(sizes, layouts, tile, without_instructions, monkeypatch):
    monkeypatch.setattr(half_products, "_TILE", tile)
    torch.manual_seed(0)
    n, k, m = sizes
    a, b = _laid_out((n, k), layouts[0]), _laid_out((k, m), layouts[1])
    exact = a.float() @ b.float()
    for start in (None, torch.randn(n, m).bfloat16(), torch.randn(m, n).bfloat16().mT):
        expected, actual = exact, product(a, b)
        assert start is not None or torch.equal(actual, product(a, b, out=torch.empty_like(actual)))
        if start is not None:
            expected = exact + start.float()
            actual = product(a, b, out=start, adds=True)
            assert actual.data_ptr() == start.data_ptr()
        # One rounding to 2^-9; sums of float32 in another order.
        torch.testing.assert_close(actual.float(), expected, rtol=2**-8, atol=1e-4)


def test_second_derivatives_are_there_too(without_instructions):
    torch.manual_seed(0)
    found = []
    for dtype, multiply in ((torch.bfloat16, product), (torch.float32, torch.mm)):
        torch.manual_seed(0)
        a, b = (torch.randn(6, 6).bfloat16().to(dtype).requires_grad_() for _ in range(2))
        (slope,) = torch.autograd.grad(multiply(a, b).square().sum(), a, create_graph=True)
        found.append(torch.autograd.grad(slope.sum(), (a, b)))
    for ours, exact in zip(*found, strict=True):
        assert (ours.float() - exact).norm() <= 2**-7 * exact.norm()


def test_what_does_not_fit_together_is_refused_as_ever(without_instructions):
    half, whole = torch.randn(4, 6).bfloat16(), torch.randn(6, 3)
    with pytest.raises(RuntimeError, match="dtype"):
        product(half, whole)
    with pytest.raises(RuntimeError, match="shapes"):
        product(half, whole[:5].bfloat16())
    layer = nn.Linear(6, 3)
    with pytest.raises(RuntimeError, match="dtype"):
        call_linear(layer, half)


@pytest.mark.parametrize("autocast", HALF, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_goes_through_float32_too_and_its_results_have_its_dtype(dtype, autocast, without_instructions):
    torch.manual_seed(0)
    layer, x = nn.Linear(40, 30).to(dtype), torch.randn(9, 40).to(dtype)
    with torch.autocast("cpu", autocast), Products() as products:
        actual = call_linear(layer, x)
    assert actual.dtype == autocast and products.dtypes == {torch.float32}
    exact = layer.double()(x.double())
    assert (actual - exact).norm() <= 2**-6 * exact.norm()


class Products(TorchDispatchMode):
    """The dtypes of what is multiplied, and the largest float32 tensor that is made."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.dtypes |= {tensor.dtype for tensor in args if isinstance(tensor, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.largest = max(self.largest, result.numel())
        return result


def test_no_float32_copy_of_a_weight_or_of_its_gradient_is_made(without_instructions, monkeypatch):
    monkeypatch.setattr(half_products, "_TILE", 1000)
    layer, x = nn.Linear(100, 300, bias=False).bfloat16(), torch.randn(4, 100).bfloat16().requires_grad_()
    with Products() as products:
        call_linear(layer, x).sum().backward()
    assert products.dtypes == {torch.float32} and 0 < products.largest <= 4 * 300
    assert layer.weight.grad.is_contiguous()


def test_where_there_are_instructions_nothing_is_made_float32(monkeypatch):
    pretend(monkeypatch, *HALF)
    layer, x = nn.Linear(100, 300).bfloat16(), torch.randn(20, 100).bfloat16().requires_grad_()
    with Products() as products:
        call_linear(layer, x).sum().backward()
    assert products.dtypes == {torch.bfloat16} and products.largest == 0


def test_a_row_is_multiplied_as_it_is(without_instructions):
    layer = nn.Linear(100, 300, bias=False).bfloat16()
    with torch.no_grad(), Products() as products:
        call_linear(layer, torch.randn(1, 100).bfloat16())
    assert products.dtypes == {torch.bfloat16}


def test_only_linear_products_change_inside_the_mode(without_instructions):
    a = torch.randn(8, 8).bfloat16()
    with LinearThroughFloat32(), Products() as products:
        torch.mm(a, a)
    assert products.dtypes == {torch.bfloat16}
