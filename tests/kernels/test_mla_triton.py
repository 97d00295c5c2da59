"""`attn_implementation="mla_triton"`: models decode through the Triton kernel as they do by "sdpa"."""

import json
import os
import subprocess
import sys

import pytest
import torch
from places import SUPPORT

pytest.importorskip("triton", reason="Triton is not installed here")

from peft import LoraConfig, get_peft_model
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import DynamicCache, StaticCache
from two_forms import ATOL, PAD, forms, generated, padded  # noqa: F401

from modeling_deepseek_moe.kernels.triton import latent_decode
from modeling_deepseek_moe.kernels.triton import launch as triton_launch
from modeling_deepseek_moe.kernels.triton.mla_triton import attend_latents


def model_of(lineage: str, name: str = "mla_triton", **overrides):
    """Of one layer: interpreted, a launch takes tens of milliseconds."""
    overrides = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0, **overrides}
    model = tiny_model(tiny_config(lineage, eos_token_id=None, pad_token_id=PAD, **overrides))
    model.set_attn_implementation(name)
    return model


@pytest.fixture
def launches(monkeypatch):
    """Query tokens of every launch of the kernel."""
    counted, attend_cache = [], latent_decode.attend_cache

    def counting(queries, *args, **kwargs):
        counted.append(queries.shape[2])
        return attend_cache(queries, *args, **kwargs)

    monkeypatch.setattr(latent_decode, "attend_cache", counting)
    return counted


def assert_generates_as_sdpa(model, ids, mask=None, **options):
    model.set_attn_implementation("sdpa")
    expected = generated(model, ids, mask, **options)
    model.set_attn_implementation("mla_triton")
    found = generated(model, ids, mask, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=ATOL)


CHUNKS = {"prefill_chunk_size": 4}
STATIC = {"cache_implementation": "static"}


@pytest.mark.parametrize(
    ("lineage", "options", "tokens"),
    [
        ("v2_lite", {}, {1}),
        pytest.param("v3", CHUNKS, {1, 4}, marks=pytest.mark.slow),
        pytest.param("v3", STATIC, {1, 9}, marks=pytest.mark.slow),
        ("v3", CHUNKS | STATIC, {1, 4}),
    ],
    ids=["growing cache", "prompt in chunks", "static cache", "static cache, prompt in chunks"],
)
def test_padded_prompts_generate_the_tokens_of_sdpa(lineage, options, tokens, launches):
    model = model_of(lineage)
    ids, mask = padded(model.config)
    assert_generates_as_sdpa(model, ids, mask, steps=4, **options)
    # The prompt gives the first of four. A static cache is longer than the prompt, which then is absorbed too.
    assert set(launches) == tokens and launches.count(1) >= 3


def test_drafted_tokens_are_checked_in_the_kernel(launches):
    """The prompt repeats itself, so that its own continuation is the draft."""
    model = model_of("v3")
    ids = tiny_ids(model.config, batch=1, length=5).repeat(1, 3)
    expected = generated(model, ids, steps=8, prompt_lookup_num_tokens=3).sequences
    assert max(launches) > 1
    model.set_attn_implementation("sdpa")
    assert torch.equal(expected, generated(model, ids, steps=8).sequences)


def with_lora(model):
    """An adapter on `kv_b_proj` that changes what is generated."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["kv_b_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return adapted.eval()


def test_an_adapter_on_kv_b_proj_acts_in_the_kernel(launches):
    base = model_of("v3")
    ids, mask = padded(base.config)
    plain = torch.stack(generated(base, ids, mask, steps=3).logits)
    adapted = with_lora(base)
    before = len(launches)
    found = torch.stack(generated(adapted, ids, mask, steps=3).logits)
    assert len(launches) == 2 * before and (found - plain).abs().max() > 0.1
    base.set_attn_implementation("sdpa")
    expected = torch.stack(generated(adapted, ids, mask, steps=3).logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_decode_step_over_a_static_cache_is_one_graph(launches):
    """With left padding and an adapter; the second step is traced for no new reason."""
    torch.compiler.reset()
    model = with_lora(model_of("v3"))
    ids, mask = padded(model.config, lengths=(4, 7))
    steps = tiny_ids(model.config, length=4, seed=1)
    logits = {}
    for name in ("sdpa", "mla_triton"):
        model.base_model.model.set_attn_implementation(name)
        cache, seen = StaticCache(config=model.config, max_cache_len=16), mask
        model(ids, attention_mask=mask, past_key_values=cache)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if name == "mla_triton" else model
        logits[name] = []
        for step, token in enumerate(steps.split(1, dim=1)):
            seen = torch.cat((seen, torch.ones_like(token)), dim=1)
            with torch.compiler.set_stance("fail_on_recompile" if step >= 3 else "default"):
                logits[name].append(run(token, attention_mask=seen, past_key_values=cache).logits)
    assert len(launches) >= 4
    torch.testing.assert_close(torch.stack(logits["mla_triton"]), torch.stack(logits["sdpa"]), rtol=0, atol=ATOL)


def cached_run(model, ids, tokens, **kwargs):
    """The last tokens on a cache of those before."""
    past = DynamicCache()
    with torch.no_grad():
        model(ids[:, :-tokens], past_key_values=past)
    return model(ids[:, -tokens:], past_key_values=past, **kwargs).logits


def assert_is_left_to_torch(launches, logits, expected):
    assert not launches
    torch.testing.assert_close(logits, expected, rtol=0, atol=ATOL)


@torch.no_grad()
def test_what_the_kernel_does_not_do_is_left_to_torch(launches, forms):  # noqa: F811
    """17 query tokens, a mask of numbers, a mask that differs between heads, dropout, float64, autocast's mixture."""
    model, sdpa = model_of("v3"), model_of("v3", "sdpa")
    ids = tiny_ids(model.config, length=40)
    with forms(True) as calls:
        for tokens, options in [
            (17, {}),
            (2, {"attention_mask": torch.zeros(2, 1, 2, 40)}),
            (2, {"attention_mask": torch.rand(2, 4, 2, 40) > 0.5}),
        ]:
            found, expected = (cached_run(each, ids, tokens, **options) for each in (model, sdpa))
            assert_is_left_to_torch(launches, found, expected)
        assert calls["absorbed"] == 2 * 2 * 3
        cached_run(model, ids, 16)
        assert launches == [16]
    attention = model.model.layers[0].self_attn
    attention.config.attention_dropout = 0.5
    queries, cached = torch.zeros(1, 4, 1, 24), torch.zeros(1, 5, 24)
    assert attend_latents(attention.train(), queries, cached, None) is None
    assert attend_latents(attention.eval(), queries, cached, None) is not None
    assert attend_latents(attention, queries.double(), cached.double(), None) is None
    assert attend_latents(attention, queries.bfloat16(), cached, None) is None


def test_gradients_go_through_torch(launches):
    gradients = []
    for name in ("mla_triton", "sdpa"):
        model = model_of("v3", name)
        cached_run(model, tiny_ids(model.config, length=20), 2).logsumexp(-1).mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert not launches
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def test_prompts_and_training_are_those_of_sdpa(launches):
    """Packed sequences by a mask of their own."""
    model, sdpa = model_of("v3"), model_of("v3", "sdpa")
    ids = tiny_ids(model.config, length=9)
    packed = torch.cat((torch.arange(4), torch.arange(5)))[None].expand(2, -1)
    for options in ({"labels": ids}, {"position_ids": packed, "use_cache": False}):
        torch.testing.assert_close(model(ids, **options).logits, sdpa(ids, **options).logits, rtol=0, atol=ATOL)
    assert not launches


def test_a_model_without_latents_is_refused():
    with pytest.raises(ValueError, match='this model\'s is plain. Use "sdpa"') as refused:
        model_of("v1")
    assert "\n" not in str(refused.value)


REFUSED = (
    'attn_implementation="mla_triton" cannot be used: Triton\'s kernels run on CUDA devices, the tensors are on cpu. '
    'Use "sdpa" or "auto"'
)


def test_where_triton_cannot_run_the_name_and_a_model_moved_there_are_refused_in_one_line(monkeypatch):
    model = model_of("v3")
    ids = tiny_ids(model.config, length=8)
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=f"^{REFUSED}$"):
        model_of("v3")
    with pytest.raises(ValueError, match="^latent_attention: Triton's kernels run on CUDA devices, [^\n]*$"):
        generated(model, ids)


@pytest.mark.slow
def test_importing_the_package_imports_no_kernel_of_triton_and_without_interpreter_the_name_is_refused():
    program = """
import json, sys
import modeling_deepseek_moe
imported = [name for name in sys.modules if "kernels.latent" in name or "kernels.triton" in name]
from tiny import tiny_config, tiny_model
try:
    tiny_model(tiny_config("v3")).set_attn_implementation("mla_triton")
except ValueError as error:
    print(json.dumps([str(error), imported]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(SUPPORT)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == [REFUSED, []]
