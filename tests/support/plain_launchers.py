"""For tests of what stands on the Triton kernels: fixtures that put plain PyTorch in the kernels' places.

Interpreted on CPU, a pass of tiny experts takes seconds; the kernels are compared to these counterparts beside them.
"""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from modeling_deepseek_moe.kernels.triton import gate_up, grouped_gemm, pair_sorting, reference, weight_gradient

LAUNCHERS = {
    pair_sorting: ("sort_pairs", "sum_pairs"),
    gate_up: ("gate_up_product", "gate_backward"),
    grouped_gemm: ("rows_product",),
    weight_gradient: ("weight_gradient",),
}


@pytest.fixture
def counterparts(monkeypatch) -> None:
    for module, names in LAUNCHERS.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(reference, name))


@pytest.fixture
def launched(monkeypatch) -> list:
    """The kernels that were launched, none of which runs: results have shapes and no values."""
    kernels = []
    for module in LAUNCHERS:
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **kwargs: kernels.append(kernel))
    return kernels


@pytest.fixture(params=["counterparts", pytest.param("interpreted", marks=pytest.mark.slow)])
def both_ways(request) -> None:
    if request.param == "counterparts":
        request.getfixturevalue("counterparts")
