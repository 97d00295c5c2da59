"""The router against the traps of FACTS 8.5."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.router import DeepseekMoeRouter

HIDDEN = 16


def make_router(**overrides) -> DeepseekMoeRouter:
    fields = {
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
        **overrides,
    }
    router = DeepseekMoeRouter(DeepseekMoeConfig(**fields))
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(router.weight, generator=generator)
    return router


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(2))


def test_t1_v2_normalises_instead_of_scaling_and_v3_normalises_then_scales(tokens):
    v2 = make_router(topk_method="greedy", scoring_func="softmax", norm_topk_semantics="deepseek_v2")
    v3 = make_router(norm_topk_semantics="deepseek_v3")
    for router, total in ((v2, 1.0), (v3, 16.0)):
        _, weights, _ = router(tokens)
        torch.testing.assert_close(weights.sum(-1), torch.full((200,), total))
    plain = make_router(
        topk_method="greedy", scoring_func="softmax", norm_topk_semantics="deepseek_v2", norm_topk_prob=False
    )
    logits, weights, index = plain(tokens)
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, index) * 16)


@pytest.mark.parametrize("mean_bias", [-0.3, -0.5, -0.7, -3.0])
def test_t2_a_lost_group_never_wins_however_negative_the_biases_are(tokens, mean_bias):
    router = make_router()
    router.e_score_correction_bias.normal_(mean_bias, 0.05, generator=torch.Generator().manual_seed(3))
    logits, _, index = router(tokens)
    biased = (logits.sigmoid() + router.e_score_correction_bias).view(-1, 4, 4)
    kept = biased.topk(2, -1).values.sum(-1).topk(2, -1).indices
    assert (
        torch.isin(index // 4, kept).all()
        if len(tokens) == 1
        else all(set((row // 4).tolist()) <= set(groups.tolist()) for row, groups in zip(index, kept, strict=True))
    )


def test_t3_the_bias_chooses_experts_and_never_weighs_them(tokens):
    router = make_router(n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0)
    _, _, before = router(tokens)
    router.e_score_correction_bias[5] = 12.0
    logits, weights, after = router(tokens)
    assert (after == 5).any(-1).all() and not (before == 5).any(-1).all()
    assert torch.equal(weights, logits.sigmoid().gather(1, after))


def test_t3_weights_stay_finite_when_tiny_scores_are_chosen_by_a_large_bias(tokens):
    router = make_router(n_group=1, topk_group=1)
    with torch.no_grad():
        router.weight.zero_()[:, 0] = -1.0
    router.e_score_correction_bias[:4] = 12.0
    _, weights, index = router(torch.full((3, HIDDEN), 18.0))
    assert (index < 4).all() and torch.isfinite(weights).all()
    torch.testing.assert_close(weights.sum(-1), torch.full((3,), 16.0))


def test_t4_groups_of_one_expert_and_absent_groups_route(tokens):
    single = make_router(n_group=16, topk_group=4)
    ungrouped = make_router(n_group=None, topk_group=None)
    for router in (single, ungrouped):
        logits, _, index = router(tokens)
        best = logits.sigmoid().topk(4, -1).indices
        assert torch.equal(index.sort(-1).values, best.sort(-1).values)


def test_t10_the_router_computes_in_float32_also_under_autocast_and_in_the_model_dtype_on_request():
    tokens = torch.randn(4000, HIDDEN, generator=torch.Generator().manual_seed(5))
    exact = make_router()(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = make_router()(tokens)
    assert torch.equal(exact[0], under_autocast[0])
    half = make_router(router_dtype="model").to(torch.bfloat16)(tokens.bfloat16())
    assert half[0].dtype == torch.float32 and not torch.equal(half[0], exact[0])
    same = (half[2].sort(-1).values == exact[2].sort(-1).values).float().mean()
    # bfloat16 has 8 bits: near ties flip, most choices do not.
    assert 0.8 < same < 1.0


def test_t19_the_bias_stays_float32_and_unrounded_through_casts_of_the_module():
    router = make_router()
    router.e_score_correction_bias.uniform_(2.02, 2.03)
    before = router.e_score_correction_bias.clone()
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()):
        cast(router)
        assert router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(router.e_score_correction_bias, before)
    router.half()
    assert router.weight.dtype == torch.float16


def test_t27_the_bias_is_no_parameter():
    assert [name for name, _ in make_router().named_parameters()] == ["weight"]


def test_t30_dense_weights_equal_those_of_transformers_v3_whatever_the_order(tokens):
    router = make_router()
    router.e_score_correction_bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(4))
    native = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=HIDDEN,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=16.0,
        )
    )
    native.load_state_dict(router.state_dict())

    def dense(weights, index):
        return torch.zeros(len(tokens), 16).scatter(1, index, weights)

    torch.testing.assert_close(dense(*router(tokens)[1:]), dense(*native(tokens)[1:]))


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("topk_method", ["greedy", "group_limited_greedy", "noaux_tc"])
def test_t32_scoring_function_and_method_are_honoured_in_every_combination(tokens, scoring_func, topk_method):
    router = make_router(scoring_func=scoring_func, topk_method=topk_method, norm_topk_prob=False)
    logits, weights, index = router(tokens)
    scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(-1)
    torch.testing.assert_close(weights, scores.gather(1, index) * 16)
    groups = {"greedy": 4, "group_limited_greedy": 2, "noaux_tc": 2}[topk_method]
    assert max(len(set(row.tolist())) for row in index // 4) <= groups
    assert hasattr(router, "e_score_correction_bias") == (topk_method == "noaux_tc")


def test_v2_groups_are_ranked_by_their_best_expert_and_v3_groups_by_their_two_best():
    scores = torch.full((1, 16), 0.1)
    scores[0, 0] = 0.9
    scores[0, 4:6] = 0.6
    for method, winner in (("group_limited_greedy", 0), ("noaux_tc", 1)):
        router = make_router(topk_method=method, topk_group=1)
        kept = torch.isfinite(router.keep_best_groups(scores)).view(4, 4).all(-1)
        assert kept.nonzero().tolist() == [[winner]]
