"""FP8 checkpoints read by `from_pretrained` directly: the weights of our bfloat16 copy, bit for bit."""

import json

import pytest
import torch
from checkpoint_folders import assert_bit_equal, tensors_of
from convert_folders import QUANTIZATION, bf16_tensors, fp8_folder, plainly_dequantized, ragged_json, sharded
from peft import LoraConfig, get_peft_model
from tiny import tiny_ids
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from modeling_deepseek_moe import CheckpointError, DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion import convert
from modeling_deepseek_moe.fp8_blocks import dequantize_blocks, quantize_blocks, scale_shape

DEQUANTIZE = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
WEIGHT = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module", params=[torch.float32, torch.float8_e8m0fnu], ids=["float32", "ue8m0"])
def fp8(request, tmp_path_factory):
    return fp8_folder(tmp_path_factory.mktemp("source") / "fp8", request.param)


def saved(model, folder) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return tensors_of(folder)


def test_an_fp8_folder_loads_bit_equal_to_its_bfloat16_copy_and_is_saved_as_one(fp8, tmp_path):
    """FACTS T21: 192 rows are two blocks, and divide evenly by two."""
    model, info = DeepseekMoeForCausalLM.from_pretrained(fp8, output_loading_info=True, **DEQUANTIZE)
    assert not any(info.values()), info
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    convert(fp8, tmp_path / "bf16", "bf16")
    copy = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "bf16")
    assert_bit_equal(dict(model.state_dict()), dict(copy.state_dict()))
    assert_bit_equal(saved(model, tmp_path / "saved"), plainly_dequantized(tensors_of(fp8)))
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_without_a_gpu_nothing_need_be_said(fp8):
    """On a GPU that multiplies FP8 itself, transformers would keep the weights in FP8."""
    if torch.cuda.is_available():
        pytest.skip("transformers keeps FP8 weights on a GPU unless told otherwise")
    model = DeepseekMoeForCausalLM.from_pretrained(fp8)
    told = DeepseekMoeForCausalLM.from_pretrained(fp8, **DEQUANTIZE)
    assert_bit_equal(dict(model.state_dict()), dict(told.state_dict()))


def test_weights_that_would_stay_fp8_are_refused_with_the_way_out(fp8, monkeypatch):
    """As on a GPU that multiplies FP8: the quantizer is told that there is one, and the model stays on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with pytest.raises(CheckpointError, match=r"cannot stay FP8 in this model; pass quantization_config="):
        DeepseekMoeForCausalLM.from_pretrained(fp8, device_map="cpu")


def test_an_adapter_loads_on_top_of_an_fp8_base_and_is_saved_alone(fp8, tmp_path):
    """The adapter's file is no checkpoint of the model, and must not be read as FP8."""
    model = DeepseekMoeForCausalLM.from_pretrained(fp8, dtype=torch.float32, **DEQUANTIZE)
    config = LoraConfig(target_modules=["q_b_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = DeepseekMoeForCausalLM.from_pretrained(fp8, dtype=torch.float32, **DEQUANTIZE)
    again.load_adapter(str(tmp_path / "adapter"))
    ids = tiny_ids(again.config)
    assert torch.equal(again(ids).logits, adapted(ids).logits)


def test_an_fp8_folder_loads_in_float32_without_rounding_twice(fp8):
    model = DeepseekMoeForCausalLM.from_pretrained(fp8, dtype=torch.float32, **DEQUANTIZE)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tensors = tensors_of(fp8)
    scale = tensors[f"{WEIGHT}_scale_inv"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    exact = tensors[WEIGHT].float() * scale[: tensors[WEIGHT].shape[0], : tensors[WEIGHT].shape[1]]
    assert torch.equal(model.get_parameter(WEIGHT), exact)


def test_the_auto_class_loads_an_fp8_folder_of_a_type_it_knows_as_ours(tmp_path):
    source = fp8_folder(tmp_path / "fp8", lineage="v3")
    config_json = json.loads((source / "config.json").read_text()) | {"model_type": "kimi_k2"}
    (source / "config.json").write_text(json.dumps(config_json))
    ours = AutoModelForCausalLM.from_pretrained(source, **DEQUANTIZE)
    assert isinstance(ours, DeepseekMoeForCausalLM)
    assert torch.isfinite(ours(tiny_ids(ours.config)).logits).all()


@pytest.mark.parametrize("lineage", ["v1", "v2_lite"])
def test_fp8_works_for_the_other_generations_too(lineage, tmp_path):
    source = fp8_folder(tmp_path / "fp8", lineage=lineage)
    model = DeepseekMoeForCausalLM.from_pretrained(source, **DEQUANTIZE)
    assert_bit_equal(saved(model, tmp_path / "saved"), plainly_dequantized(tensors_of(source)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{WEIGHT}_scale_inv"), f"FP8 tensor {WEIGHT} has no {WEIGHT}_scale_inv"),
        (
            lambda tensors: tensors.update({f"{WEIGHT}_scale_inv": torch.ones(1, 2)}),
            rf"{WEIGHT}_scale_inv is \[1, 2\], which does not fit a weight of \[192, 64\] in blocks of 128x128",
        ),
        (lambda tensors: tensors.pop(WEIGHT), f"{WEIGHT}_scale_inv has no weight {WEIGHT}"),
        (
            lambda tensors: tensors.update({f"{WEIGHT}_scale_inv": torch.ones(2, 1, dtype=torch.float16)}),
            f"{WEIGHT}_scale_inv is F16, not one of F32, F8_E8M0",
        ),
        (lambda tensors: tensors.pop("model.norm.weight"), r"1 missing \(model\.norm\.weight\)"),
    ],
    ids=["no scale", "shape of the scale", "no weight", "type of the scale", "another tensor missing"],
)
def test_a_broken_fp8_folder_is_refused_before_any_tensor_is_read(change, message, tmp_path):
    source = fp8_folder(tmp_path / "fp8")
    tensors, config_json = tensors_of(source), json.loads((source / "config.json").read_text())
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        DeepseekMoeForCausalLM.from_pretrained(sharded(tmp_path / "broken", config_json, tensors), **DEQUANTIZE)


def test_mtp_modules_that_are_announced_but_absent_are_taken_off_an_fp8_model(tmp_path):
    source = fp8_folder(tmp_path / "fp8")
    kept = {name: tensor for name, tensor in tensors_of(source).items() if not name.startswith("model.layers.2.")}
    folder = sharded(tmp_path / "kept", json.loads((source / "config.json").read_text()), kept)
    assert DeepseekMoeForCausalLM.from_pretrained(folder, **DEQUANTIZE).config.num_nextn_predict_layers == 0


def test_every_fp8_number_times_every_kind_of_scale_is_the_float32_product_rounded_once():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for finite in (True, False):
        weight = numbers.repeat(300)[torch.randperm(76800, generator=torch.Generator().manual_seed(0))].view(240, 320)
        if finite:
            weight = weight.float().nan_to_num(3.0).to(torch.float8_e4m3fn)
        for exponent in (-140, -60, -8, 0, 60, 126):
            scale = (1 + torch.arange(6.0).view(2, 3) / 7) * 2.0**exponent
            spread = scale.repeat_interleave(128, 0)[:240].repeat_interleave(128, 1)[:, :320]
            for dtype in (torch.bfloat16, torch.float32):
                expected = (weight.float() * spread).to(dtype)
                torch.testing.assert_close(
                    dequantize_blocks(weight, scale, dtype), expected, rtol=0, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (300, 500), (576, 64)])
def test_blocks_at_the_edges_have_scales_of_their_own(shape):
    """Each scale is the largest magnitude of its block over 448, whatever lies in the others (FACTS 3.4)."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    quantized, scale = quantize_blocks(weight)
    assert scale.shape == scale_shape(shape) and quantized.shape == shape
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            largest = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].abs().max().float()
            assert scale[i, j] == largest / 448
    # Half a step of e4m3 is 2^-4 of a value, or 2^-10 of the block's scale; the fp32 roundings fit in the last factor.
    spread = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    bound = torch.maximum(weight.float().abs() / 16, spread / 1024) * (1 + 1e-6)
    assert ((quantized.float() * spread - weight.float()).abs() <= bound).all()


def test_fp8_made_from_float32_weights_keeps_its_numbers_through_bfloat16():
    """As DeepSeek's were; only the scales move, by the roundings of the largest weight to bfloat16 and back."""
    weight = torch.randn(300, 500, generator=torch.Generator().manual_seed(0)) * 0.02
    quantized, scale = quantize_blocks(weight)
    again, other_scale = quantize_blocks(dequantize_blocks(quantized, scale))
    assert torch.equal(again.view(torch.uint8), quantized.view(torch.uint8))
    assert not torch.equal(other_scale, scale)
    torch.testing.assert_close(other_scale, scale, rtol=2**-8, atol=0)


def test_a_model_without_fp8_weights_in_bfloat16_is_not_touched_by_the_quantization_config(tmp_path):
    """Nothing of the folder is FP8, though its config says so: the plain weights are taken as they are."""
    config_json = ragged_json()
    tensors = bf16_tensors(config_json, tmp_path / "saved")
    folder = sharded(tmp_path / "plain", {**config_json, "quantization_config": QUANTIZATION}, tensors)
    model = DeepseekMoeForCausalLM.from_pretrained(folder, **DEQUANTIZE)
    assert_bit_equal(saved(model, tmp_path / "again"), tensors)
