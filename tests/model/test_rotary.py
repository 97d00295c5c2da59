"""Frequencies, scales and rotation against the golden numbers of FACTS 2.5 and traps T5-T8."""

import pytest
import torch

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.rotary import (
    DeepseekMoeRotaryEmbedding,
    apply_rotary,
    rotary_frequencies,
    softmax_scale,
    yarn_mscale,
)

YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}


def config_with(rope_scaling: dict | None, theta: float = 10000.0) -> DeepseekMoeConfig:
    fields = {"model_type": "deepseek_v2", "rope_theta": theta, "rope_scaling": rope_scaling}
    return DeepseekMoeConfig.from_dict({**fields, "max_position_embeddings": 163840})


@pytest.mark.parametrize(
    ("yarn", "theta", "mscale", "scale"),
    [
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, 1e4, 1.36888795, 0.13523378),
        ({**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, 1e4, 1.26080378, 0.11472139),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "factor": 32}, 5e4, 1.34657359, 0.13086080),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "factor": 64}, 5e4, 1.41588831, 0.14467963),
    ],
    ids=["V3", "V2", "Kimi-K2", "K2-Thinking"],
)
def test_softmax_scale_has_the_golden_value(yarn, theta, mscale, scale):
    assert yarn_mscale(yarn["factor"], yarn["mscale_all_dim"]) == pytest.approx(mscale, abs=1e-8)
    assert softmax_scale(config_with(yarn, theta)) == pytest.approx(scale, abs=1e-8)


@pytest.mark.parametrize(
    ("mscales", "factor"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.707}, 1.08572640),
        ({"mscale": 0.707}, 1.26080378),
        ({}, 1.36888795),
    ],
    ids=["equal", "V2 mix", "mscale alone", "neither"],
)
def test_t6_the_factor_on_cos_and_sin_follows_the_modeling_files(mscales, factor):
    _, scaling = rotary_frequencies(config_with({**YARN, **mscales}))
    assert scaling == pytest.approx(factor, abs=1e-7)


def test_t7_the_softmax_scale_uses_mscale_all_dim_and_yarn_is_on_whatever_the_length():
    config = config_with({**YARN, "mscale": 0.5, "mscale_all_dim": 1.0})
    config.max_position_embeddings = 1024
    assert softmax_scale(config) == pytest.approx(0.13523378, abs=1e-8)
    assert rotary_frequencies(config)[0][-1] < 1.0 / 1e4 ** (62 / 64) / 39


def test_the_ramp_of_v3_runs_from_dimension_10_to_23():
    inv_freq, _ = rotary_frequencies(config_with(YARN))
    ratio = inv_freq * 1e4 ** (torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(ratio[:11], torch.ones(11))
    torch.testing.assert_close(ratio[23:], torch.full((9,), 1 / 40))
    assert (ratio[11:23].diff() < 0).all()


def test_t8_equal_betas_make_a_step_between_dimensions_19_and_20():
    yarn = {**YARN, "factor": 32, "beta_fast": 1.0, "beta_slow": 1.0}
    inv_freq, _ = rotary_frequencies(config_with(yarn, 5e4))
    ratio = inv_freq * 5e4 ** (torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(ratio[:20], torch.ones(20))
    torch.testing.assert_close(ratio[20:], torch.full((12,), 1 / 32))


def test_t5_scores_are_equal_in_every_order_of_the_rotary_pairs():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    angles = torch.randn(1, 5, 4)
    cos, sin = angles.cos(), angles.sin()

    def scores(q, k):
        return q @ k.transpose(-1, -2)

    interleaved = scores(apply_rotary(q, cos, sin, True), apply_rotary(k, cos, sin, True))
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    as_complex = [torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn for x in (q, k)]
    by_complex = scores(*(torch.view_as_real(x).flatten(-2) for x in as_complex))
    order = torch.cat((torch.arange(0, 8, 2), torch.arange(1, 8, 2)))
    permuted = scores(apply_rotary(q[..., order], cos, sin, False), apply_rotary(k[..., order], cos, sin, False))
    # float32 sums of eight products: a few units in the last place.
    torch.testing.assert_close(interleaved, by_complex, rtol=0, atol=2e-6)
    torch.testing.assert_close(interleaved, permuted, rtol=0, atol=2e-6)
    wrong = scores(apply_rotary(q, cos, sin, False), apply_rotary(k, cos, sin, False))
    assert (wrong - interleaved).abs().max() > 0.1


def test_t5_bfloat16_inputs_are_rotated_in_float32_and_rounded_once():
    x = torch.randn(1, 1, 3, 8, dtype=torch.bfloat16)
    angles = torch.randn(1, 3, 4)
    rotated = apply_rotary(x, angles.cos(), angles.sin(), True)
    exact = apply_rotary(x.float(), angles.cos(), angles.sin(), True)
    assert rotated.dtype == torch.bfloat16 and torch.equal(rotated, exact.bfloat16())


def test_frequencies_stay_float32_when_the_module_is_cast():
    rotary = DeepseekMoeRotaryEmbedding(config_with(YARN))
    before = rotary.inv_freq.clone()
    assert torch.equal(rotary.to(torch.bfloat16).inv_freq, before)
    cos, _ = rotary(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([[100_000]]))
    assert cos.dtype == torch.float32


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_other_rope_types_come_from_transformers(rope_type):
    config = config_with({"type": rope_type, "factor": 4.0})
    rotary = DeepseekMoeRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(8).unsqueeze(0))
    assert cos.shape == sin.shape == (1, 8, 32)
