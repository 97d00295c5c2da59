"""Attention implementations: the kernel that runs, packed sequences, and names chosen or refused."""

import contextlib
import logging

import pytest
import torch
from reference_flash import flash_by_name  # noqa: F401
from tiny import tiny_config, tiny_ids, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM, attention_backends
from modeling_deepseek_moe.attention_backends import best_attention, sdpa_cudnn_attention

LINEAGES = ["v1", "v2", "v3"]
# Float32 models with logits up to ten, the same sums in another order.
ATOL = 1e-5
A100, H100, B200 = (8, 0), (9, 0), (10, 0)
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


def model_of(lineage: str, implementation: str = "sdpa", **overrides):
    model = tiny_model(tiny_config(lineage, aux_loss_alpha=0.0, **overrides))
    if implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
    else:
        model.config._attn_implementation_internal = implementation
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected) -> None:
    """Equal up to some float32 roundings of the largest entry."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        bound = 1e-5 * gradient.abs().max().item() + 1e-9
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def documents(config, lengths=(5, 1, 7)) -> list[dict[str, list[int]]]:
    ids = tiny_ids(config, batch=1, length=sum(lengths))[0]
    return [{"input_ids": part.tolist()} for part in ids.split(lengths)]


@pytest.mark.parametrize("flash_arguments", [False, True], ids=["positions", "positions and cumulative lengths"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash"])
@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_step_on_packed_documents_has_the_gradients_of_separate_ones(
    lineage,
    implementation,
    flash_arguments,
    flash_by_name,  # noqa: F811
):
    """Packed as transformers' collator does; the loss is the sum over all targets, MTP's own loss among them."""
    name = flash_by_name if implementation == "flash" else implementation
    overrides = {"mtp_loss_weight": 0.5} if lineage == "v3" else {}
    packed, separate = (model_of(lineage, name, **overrides).train() for _ in range(2))
    rows = documents(packed.config)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_arguments)(rows)
    assert ("cu_seq_lens_q" in batch) == flash_arguments and "attention_mask" not in batch
    targets = int((batch["labels"] != -100).sum())
    packed(**batch, num_items_in_batch=targets).loss.backward()
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        # Its first token is no target when packed. A document of one token has no target at all.
        if ids.shape[1] > 1:
            separate(ids, labels=ids, num_items_in_batch=targets).loss.backward()
    assert_same_gradients(gradients(packed), gradients(separate))


@pytest.mark.parametrize("lineage", LINEAGES)
def test_lengths_of_packed_documents_arrive_at_the_attention_function(lineage, monkeypatch):
    arrived = []

    def recorded(module, query, key, value, attention_mask, **kwargs):
        arrived.append((attention_mask, kwargs))
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", recorded)
    model = model_of(lineage)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents(model.config))
    model(**batch, use_cache=False)
    assert len(arrived) == model.config.num_hidden_layers
    document = torch.tensor([0] * 5 + [1] + [2] * 7)
    expected = (document[:, None] == document) & torch.ones(13, 13, dtype=torch.bool).tril()
    for mask, kwargs in arrived:
        assert torch.equal(mask[0, 0], expected)
        assert kwargs["cu_seq_lens_q"].tolist() == kwargs["cu_seq_lens_k"].tolist() == [0, 5, 6, 13]
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == 7
        assert torch.equal(kwargs["position_ids"], batch["position_ids"])


@pytest.mark.parametrize("ones", [False, True], ids=["no mask", "a mask of ones"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_two_rows_of_packed_documents_stay_apart_under_sdpa(lineage, use_cache, ones):
    model = model_of(lineage)
    ids = tiny_ids(model.config, batch=2, length=9)
    lengths = ((4, 5), (2, 7))
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    mask = torch.ones_like(ids) if ones else None
    packed = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=use_cache).logits
    for row, split in enumerate(lengths):
        alone = torch.cat([model(part[None]).logits[0] for part in ids[row].split(split)])
        torch.testing.assert_close(packed[row], alone, rtol=0, atol=ATOL)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@torch.no_grad()
def test_two_rows_of_packed_documents_are_refused_under_flash_attention(use_cache, flash_by_name):  # noqa: F811
    """Several rows of one sequence each are not, nor rows whose lengths come as cumulative ones."""
    model = model_of("v3", flash_by_name)
    ids = tiny_ids(model.config, batch=2, length=9)
    packed = torch.cat([torch.arange(4), torch.arange(5)])[None]
    for position_ids in (packed, packed.expand(2, -1)):
        with pytest.raises(
            ValueError, match="apart in a batch of one row, got 2 rows: put all sequences into one row"
        ):
            model(ids, position_ids=position_ids, use_cache=use_cache)
    model(ids, position_ids=torch.arange(9)[None], use_cache=use_cache)
    model(ids[:1], position_ids=packed, use_cache=use_cache)
    starts = torch.tensor([0, 4, 9, 13, 18])
    model(ids, position_ids=packed, use_cache=use_cache, cu_seq_lens_q=starts, cu_seq_lens_k=starts)


@contextlib.contextmanager
def kernel_calls(monkeypatch):
    """Arguments of every call of torch's kernel."""
    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        calls.append({"query": query, "key": key, "value": value, "mask": attn_mask, "is_causal": is_causal})
        return kernel(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
        yield calls


@pytest.mark.parametrize("ones", [False, True], ids=["no mask given", "a mask of ones given"])
@pytest.mark.parametrize("use_cache", [False, True], ids=["training", "prefill"])
@pytest.mark.parametrize("lineage", LINEAGES)
def test_without_padding_no_mask_is_made(lineage, use_cache, ones, monkeypatch):
    model = model_of(lineage).train(not use_cache)
    ids = tiny_ids(model.config)
    with kernel_calls(monkeypatch) as calls:
        model(ids, attention_mask=torch.ones_like(ids) if ones else None, use_cache=use_cache)
    assert len(calls) == model.config.num_hidden_layers
    for call in calls:
        assert call["mask"] is None and call["is_causal"]


# Keys of 24 and values of 16, as 192 and 128.
THREE_TO_TWO = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_training_step_runs_in_the_flash_kernel_of_the_cpu(lineage, dtype):
    """The context allows no other kernel, and that kernel refuses values that are narrower than keys."""
    model = model_of(lineage, **({} if lineage == "v1" else THREE_TO_TWO)).to(dtype).train()
    ids = tiny_ids(model.config)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(ids, labels=ids, use_cache=False).loss.backward()
        query, value = torch.randn(1, 2, 4, 24), torch.randn(1, 2, 4, 16)
        with pytest.raises(RuntimeError, match="No viable backend|No available kernel"), pytest.warns(UserWarning):
            torch.nn.functional.scaled_dot_product_attention(query, query, value, is_causal=True)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("lineage", LINEAGES)
def test_the_fast_kernel_has_the_gradients_of_the_eager_reference(lineage):
    models = [model_of(lineage, name, **({} if lineage == "v1" else THREE_TO_TWO)) for name in ("sdpa", "eager")]
    for model in models:
        ids = tiny_ids(model.config)
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
    assert_same_gradients(*map(gradients, models))


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(capability, *packages)`: as if torch saw such a GPU with these flash packages; cuDNN from Hopper on."""

    def seen(capability, *installed, cudnn=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for name in FLASH:
            available = f"is_flash_attn_{name[-1]}_available"
            monkeypatch.setattr(attention_backends, available, lambda name=name: name in installed)
        monkeypatch.setattr(attention_backends, "_cudnn_takes", lambda config, device: cudnn and capability >= H100)

    return seen


def half(lineage: str = "deepseek-v2-lite", **overrides) -> DeepseekMoeConfig:
    config = DeepseekMoeConfig.preset(lineage)
    for name, value in {"dtype": torch.bfloat16, **overrides}.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("capability", "installed", "packed", "expected"),
    [
        (H100, FLASH, False, "flash_attention_3"),
        (H100, ("flash_attention_2", "flash_attention_4"), False, "flash_attention_4"),
        (H100, ("flash_attention_2",), False, "sdpa_cudnn"),
        (H100, ("flash_attention_2",), True, "flash_attention_2"),
        (H100, (), True, "flex_attention"),
        (A100, FLASH, False, "flash_attention_2"),
        (A100, (), False, "sdpa"),
        (B200, FLASH, False, "sdpa_cudnn"),
        (B200, FLASH, True, "flash_attention_2"),
    ],
    ids=lambda value: str(value),
)
def test_the_best_name_is_the_first_that_is_installed_and_takes_the_heads(
    capability, installed, packed, expected, gpu
):
    gpu(capability, *installed)
    assert best_attention(half(), "cuda", packed) == best_attention(half(), None, packed) == expected


def test_heads_dtype_dropout_and_cudnn_count(gpu):
    gpu(H100, *FLASH)
    assert best_attention(half(dtype=torch.float32), "cuda") == "sdpa"
    assert best_attention(half(dtype=None), "cuda") == "sdpa"
    assert best_attention(half(dtype="bfloat16"), "cuda") == "flash_attention_3"
    assert best_attention(half(attention_dropout=0.1), "cuda") == "sdpa_cudnn"
    assert best_attention(half(qk_head_dim=320), "cuda") == "sdpa_cudnn"
    gpu(H100, cudnn=False)
    assert best_attention(half(), "cuda") == "sdpa"
    # Heads of 128 and 128: on Blackwell flash_attention_4 takes them, and sdpa has a flash kernel for them.
    gpu(B200, "flash_attention_4")
    assert best_attention(half("deepseek-moe-16b"), "cuda") == "flash_attention_4"
    gpu(H100)
    assert best_attention(half("deepseek-moe-16b"), "cuda") == "sdpa"


def test_every_name_passed_over_has_a_reason(gpu):
    gpu(B200, "flash_attention_4", cudnn=False)
    assert attention_backends.attention_backends(half(), "cuda", packed=True) == {
        "flash_attention_3": "its package is not installed",
        "flash_attention_4": (
            "it does not take heads with keys of 192 and values of 128, padded to 192, "
            "on a GPU of compute capability 10.0"
        ),
        "flash_attention_2": "its package is not installed",
        "flex_attention": None,
        "sdpa_cudnn": (
            "this cuDNN does not take heads with keys of 192 and values of 128 on a GPU of compute capability 10.0"
        ),
        "sdpa": None,
    }
    assert attention_backends.attention_backends(half(), "cpu") == {"sdpa": None}


def test_without_a_gpu_auto_is_sdpa_and_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    attention_backends.logger.warning_once.cache_clear()
    model_of("v3").save_pretrained(tmp_path)
    model = DeepseekMoeForCausalLM.from_pretrained(tmp_path, attn_implementation="auto")
    assert model.config._attn_implementation == model.model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    model.set_attn_implementation("auto")
    assert model.config._attn_implementation == "sdpa"
    assert [record.message for record in caplog.records].count('attn_implementation="auto" chose "sdpa"') == 1
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="auto").config._attn_implementation
        == "sdpa"
    )


def test_auto_runs_what_it_chose_and_nothing_is_chosen_unasked(monkeypatch):
    monkeypatch.setattr(attention_backends, "best_attention", lambda config: "eager")
    model = DeepseekMoeForCausalLM._from_config(tiny_config("v3"), attn_implementation="auto")
    assert model.config._attn_implementation == "eager"
    assert model_of("v3").config._attn_implementation == "sdpa"
    ids = tiny_ids(model.config)
    assert all(weights is not None for weights in model(ids, output_attentions=True).attentions)


@pytest.mark.parametrize("name", ["sdpa_cudnn", *FLASH])
def test_a_name_that_needs_a_gpu_is_refused_in_one_line_where_there_is_none(name):
    with pytest.raises((ValueError, ImportError)) as refused:
        model_of("v3").set_attn_implementation(name)
    assert len(str(refused.value).splitlines()) == 1
    if name == "sdpa_cudnn":
        expected = (
            'attn_implementation="sdpa_cudnn" cannot be used: it needs an NVIDIA GPU, and torch sees none. Use "sdpa"'
        )
        assert str(refused.value).startswith(expected)


def test_a_name_that_cannot_take_the_heads_is_refused_with_the_widths(gpu):
    gpu(A100, cudnn=False)
    with pytest.raises(
        ValueError, match="sdpa_cudnn.* does not take heads with keys of 24 and values of 16 on a GPU of"
    ):
        model_of("v3").set_attn_implementation("sdpa_cudnn")


def test_torch_is_asked_whether_cudnn_takes_the_heads():
    assert not attention_backends._cudnn_takes(half(), torch.device("cpu"))


@pytest.fixture
def cpu_kernel_for_cudnn(monkeypatch):
    """The CPU's flash kernel in the place of cuDNN's, which cannot run here."""
    monkeypatch.setattr(attention_backends, "_refusal", lambda *_: None)
    monkeypatch.setattr(attention_backends, "_CUDNN", SDPBackend.FLASH_ATTENTION)
    monkeypatch.setattr(attention_backends, "_HALF", (torch.float32,))


@torch.no_grad()
def test_sdpa_cudnn_masks_as_sdpa_does_and_runs_the_one_kernel_it_names(cpu_kernel_for_cudnn):
    """Heads as wide for values as for keys: the CPU's kernel takes no others."""
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    sdpa, cudnn = (model_of("v3", eos_token_id=None, pad_token_id=2, **heads) for _ in range(2))
    cudnn.set_attn_implementation("sdpa_cudnn")
    ids = tiny_ids(sdpa.config)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(cudnn.generate(ids, **arguments), sdpa.generate(ids, **arguments))
    assert torch.equal(cudnn.generate(ids[:, :1], max_new_tokens=5), sdpa.generate(ids[:, :1], max_new_tokens=5))
    narrow = model_of("v3")
    narrow.set_attn_implementation("sdpa_cudnn")
    narrow(ids[:, :1])  # a single key, which cuDNN does not take, is left to any kernel
    with pytest.raises(RuntimeError, match="No viable backend|No available kernel"), pytest.warns(UserWarning):
        narrow(ids)


def test_sdpa_cudnn_names_the_dtype_it_does_not_take():
    heads = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="float16 or bfloat16, not in torch.float32: load the model with dtype"):
        sdpa_cudnn_attention(torch.nn.Module(), heads, heads, heads)
