"""`from_pretrained` and `save_pretrained` of the family: nothing is silently initialised, dropped or renamed."""

import os
import re
from collections import Counter

import torch
from safetensors import safe_open
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .checkpoint_files import CheckpointError, check_folder, check_fp8_scales, check_tensors, read_entries
from .checkpoint_layout import EXPERT_STACKING, MTP_COPIES, REDUNDANT_TENSORS, is_mtp_tensor, stacks_experts
from .families import OTHER_PARTS, TEXT_PREFIX
from .finite import all_finite
from .fp8_blocks import FP8_BLOCK, SCALE_SUFFIX, dequantize_blocks
from .quantized_layers import keep_bitsandbytes_layout, make_config_true

logger = logging.get_logger(__name__)

_TEXT_PATTERN = rf"^{re.escape(TEXT_PREFIX)}"


class CheckpointMixin:
    """Checks a checkpoint before its tensors are read, and writes DeepSeek's own layout back."""

    # Other parts of a model are there only where `text_only` says to leave them out.
    _keys_to_ignore_on_load_unexpected = [*REDUNDANT_TENSORS, *(rf"^{re.escape(part)}" for part in OTHER_PARTS)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, text_only: bool = False, **kwargs):
        """Loads DeepSeek's own checkpoints of every generation, from a folder or the Hub; safetensors only.

        Args:
            text_only: of a model of several parts (Kimi-K2.5 also sees) load the text part alone; it is saved as a
                model of its own. Without, such a model is refused.

        Raises:
            CheckpointError: files that are broken, incomplete, or do not fit the config; names file and tensors.
        """
        if text_only:
            kwargs["key_mapping"] = {_TEXT_PATTERN: "", **(kwargs.get("key_mapping") or {})}
        if not kwargs.get("gguf_file"):
            if kwargs.get("use_safetensors") is False:
                raise CheckpointError("use_safetensors=False: only safetensors files are read; convert pickles first")
            kwargs["use_safetensors"] = True
            folder = pretrained_model_name_or_path
            if folder is not None and os.path.isdir(folder):
                check_folder(os.path.join(folder, kwargs.get("subfolder") or ""))
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # Tensors of a quantised checkpoint have other names and shapes; transformers' own report covers those.
        # `expected_keys` are given for an adapter, which goes on top of a model that is already there.
        from_fp8 = expected_keys is None and is_fp8_to_dequantize(load_config)
        if expected_keys is None:
            refuse_other_parts(state_dict, checkpoint_files, load_config)
        if (not is_quantized_checkpoint(load_config) or from_fp8) and expected_keys is None:
            check_and_fit(model, state_dict, checkpoint_files, load_config)
        if from_fp8:
            dequantize_ragged_blocks(load_config)
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        if from_fp8:
            # It is a plain model from here on, and saved as one.
            renamings = [rule for rule in model._weight_conversions if isinstance(rule, WeightRenaming)]
            model._weight_conversions = [*renamings, *EXPERT_STACKING]
        rules = getattr(model, "_weight_conversions", None) or []
        if any(map(is_text_rule, rules)):  # what is saved is a text model
            model._weight_conversions = [rule for rule in rules if not is_text_rule(rule)]
        return loaded

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        other = sorted(
            f"{name} is {list(found)} instead of {list(own)}" for name, found, own in loading_info.mismatched_keys
        )
        if other and not load_config.ignore_mismatched_sizes:
            raise CheckpointError(
                f"{load_config.pretrained_model_name_or_path}: {', '.join(other)}; ignore_mismatched_sizes=True "
                "starts a task head anew"
            )
        new_heads = {name for name in loading_info.missing_keys if name.startswith("score.")}
        lost = set(loading_info.missing_keys) - new_heads - model.all_tied_weights_keys.keys()
        if lost and not is_quantized_checkpoint(load_config):
            raise CheckpointError(f"{load_config.pretrained_model_name_or_path} lacks {', '.join(sorted(lost))}")
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if new_heads:
            logger.warning(f"{type(model).__name__}: {', '.join(sorted(new_heads))} is new and must be trained")
        check_biases(model, load_config.pretrained_model_name_or_path)
        model.freeze_idle_mtp()
        keep_bitsandbytes_layout(model)
        return loading_info

    def save_pretrained(self, save_directory, *args, state_dict: dict | None = None, **kwargs):
        """Writes the model under DeepSeek's tensor names; MTP modules get their copies of embedding and head back.

        Raises:
            ValueError: the weights were quantised in a way that has no file format, or that the config does not name.
        """
        is_adapted = getattr(self, "_hf_peft_config_loaded", False)
        if not is_adapted:
            make_config_true(self)
        quantizer = getattr(self, "hf_quantizer", None)
        if quantizer is not None and not is_adapted and not quantizer.is_serializable():
            method = quantizer.quantization_config.quant_method
            method = getattr(method, "value", method)
            raise ValueError(
                f"weights that were quantised while loading ({method}) are not saved: save the adapter, and merge it "
                "into the unquantised checkpoint (`deepseek-moe convert MODEL TARGET --to bf16 --adapter ADAPTER`)"
            )
        if self._auto_class is None:
            drop_local_code(self.config)
        keep_stacks(self)
        if self.config.num_nextn_predict_layers and not is_adapted:
            state_dict = with_mtp_copies(self, self.state_dict() if state_dict is None else state_dict)
        return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)


def keep_stacks(model) -> None:
    """Lets a model whose family stacks experts in its files be saved so."""
    if stacks_experts(model.config):
        rules = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [rule for rule in rules if isinstance(rule, WeightRenaming)]


def is_text_rule(rule) -> bool:
    """Whether this is the renaming that `text_only` asks for."""
    return isinstance(rule, WeightRenaming) and list(rule.source_patterns) == [_TEXT_PATTERN]


def refuse_other_parts(state_dict, checkpoint_files, load_config) -> None:
    """Raises for a checkpoint of several parts, unless `text_only` says to leave the others out."""
    if any(map(is_text_rule, load_config.weight_mapping or [])):
        return
    names = list(state_dict or ())
    if state_dict is None:
        files = [file for file in checkpoint_files if str(file).endswith(".safetensors")]
        names = [name for file in files for name in read_entries(file)]
    parts = Counter(part for name in names for part in (TEXT_PREFIX, *OTHER_PARTS) if name.startswith(part))
    if parts:
        found = ", ".join(f"{count} tensors {part}*" for part, count in parts.items())
        raise CheckpointError(
            f"{load_config.pretrained_model_name_or_path or 'the state dict'} holds more than a text model ({found}): "
            "text_only=True loads its text part and leaves the rest out (`text_only: true` in a recipe, --text-only "
            "in a command)"
        )


def check_and_fit(model, state_dict, checkpoint_files, load_config) -> None:
    """Raises for a checkpoint that does not fit the model, and takes off MTP modules it does not have."""
    source = str(load_config.pretrained_model_name_or_path or "the state dict")
    specs, file_of = {}, {}
    if state_dict is not None:
        safetensors_name = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.float32: "F32"}
        for name, tensor in state_dict.items():
            specs[name] = (safetensors_name.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
    else:
        for file in checkpoint_files:
            entries = read_entries(file) if str(file).endswith(".safetensors") else {}
            if twice := next((name for name in entries if name in file_of), None):
                raise CheckpointError(f"{file}: tensor {twice} is in {os.path.basename(file_of[twice])} as well")
            specs |= {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
            file_of |= dict.fromkeys(entries, file)
    if not specs:
        return
    scales = [name for name in specs if name.endswith(f".weight{SCALE_SUFFIX}")]
    if is_quantized_checkpoint(load_config):
        check_fp8_scales(specs, source, fp8_block(load_config.hf_quantizer))
    elif scales:
        raise CheckpointError(
            f"{source} holds FP8 weights ({scales[0]}, ...) but its config has no quantization_config; "
            "add it, or convert the weights with `deepseek-moe convert --to bf16`"
        )
    shapes = {name: shape for name, (_, shape) in specs.items() if not name.endswith(SCALE_SUFFIX)}
    # A user's `key_mapping` renames while loading.
    renamings = [rule for rule in load_config.weight_mapping or [] if isinstance(rule, WeightRenaming)]
    for rule in renamings:
        shapes = {rule.rename_source_key(name)[0]: shape for name, shape in shapes.items()}
    with_head = hasattr(model, "lm_head") and not model.config.tie_word_embeddings
    has_mtp = check_tensors(model.config, shapes, with_head, source)
    if model.config.num_nextn_predict_layers and not has_mtp:
        logger.warning_once(
            f"{source} announces num_nextn_predict_layers={model.config.num_nextn_predict_layers} but has no tensor "
            "of a multi-token prediction module; it is loaded, and will be saved, without one"
        )
        model.remove_mtp_layers()
        for name in [name for name in load_config.device_map or {} if is_mtp_tensor(name, model.config)]:
            del load_config.device_map[name]
    elif has_mtp:
        warn_of_other_copies(file_of, model.config, source)


class DequantizeBlocks(ConversionOps):
    """The load operation that turns FP8 weights and their scales into the model's dtype, ragged blocks included.

    transformers 5.23 has its own, which divides the weight evenly by the number of scales: it refuses V3's
    `kv_a_proj_with_mqa` (576 rows in 5 blocks), and misreads a weight whose rows happen to divide.
    """

    def __init__(self, hf_quantizer):
        # transformers leaves the dtypes of what goes through an operation with this attribute alone.
        self.hf_quantizer = hf_quantizer
        self.block = fp8_block(hf_quantizer)

    def convert(self, input_dict: dict, full_layer_name: str, model, **kwargs) -> dict:
        module_name, _, name = full_layer_name.rpartition(".")
        dtype = getattr(model.get_submodule(module_name), name).dtype
        # transformers 5.20 ends some of the patterns with "$".
        scales_of = {key.removesuffix("$"): tensors for key, tensors in input_dict.items()}
        result = {}
        for key, tensors in input_dict.items():
            pattern = key.removesuffix("$")
            if pattern.endswith((SCALE_SUFFIX, "activation_scale")):
                continue
            scales = scales_of.get(pattern + SCALE_SUFFIX)
            if scales is None:
                tensors = [tensor.to(dtype) for tensor in tensors]
            else:
                # transformers 5.20 has cast some to the model's dtype by now, in which every FP8 value is exact.
                pairs = zip((tensor.to(torch.float8_e4m3fn) for tensor in tensors), scales, strict=True)
                tensors = [dequantize_blocks(weight, scale, dtype, self.block) for weight, scale in pairs]
            if pattern == "weight":
                return {full_layer_name: tensors[0]}
            result[key] = tensors
        return result


def is_quantized_checkpoint(load_config) -> bool:
    """Whether the files themselves hold quantised weights, rather than weights that are quantised while loading."""
    return load_config.hf_quantizer is not None and load_config.hf_quantizer.pre_quantized


def is_fp8_to_dequantize(load_config) -> bool:
    """Whether the checkpoint's FP8 blocks become plain weights while loading.

    Raises:
        CheckpointError: they would stay FP8, as transformers wants it on a GPU that can multiply them; absorbed
            attention computes with the weights themselves, without their scales.
    """
    config = getattr(load_config.hf_quantizer, "quantization_config", None)
    if getattr(config, "quant_method", None) != "fp8":
        return False
    if not config.dequantize:
        raise CheckpointError(
            f"{load_config.pretrained_model_name_or_path}: weights cannot stay FP8 in this model; pass "
            "quantization_config=FineGrainedFP8Config(dequantize=True)"
        )
    return True


def fp8_block(hf_quantizer) -> tuple[int, int]:
    """Rows and columns of a block, as the checkpoint's `quantization_config` says."""
    return tuple(hf_quantizer.quantization_config.weight_block_size or FP8_BLOCK)


def dequantize_ragged_blocks(load_config) -> None:
    """Puts `DequantizeBlocks` where the quantizer put its own operation."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    ours = DequantizeBlocks(load_config.hf_quantizer)
    for converter in load_config.weight_mapping:
        if isinstance(converter, WeightConverter):
            converter.operations = [ours if isinstance(op, Fp8Dequantize) else op for op in converter.operations]


def warn_of_other_copies(file_of: dict[str, str], config, source: str) -> None:
    """Says so if an MTP module's own embedding or head is not the main model's, which this package shares instead."""

    def read(name: str) -> torch.Tensor:
        with safe_open(file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    for name in file_of:
        shared = next((MTP_COPIES[copy] for copy in MTP_COPIES if name.endswith(f".{copy}")), None)
        if not is_mtp_tensor(name, config) or shared not in file_of:
            continue
        if not torch.equal(read(name), read(shared)):
            logger.warning(f"{source}: {name} differs from {shared}; the latter is used, and saved, for both")


def drop_local_code(config) -> None:
    """Forgets the code files beside the checkpoint that `config` was read from: they are not copied along."""
    auto_map = getattr(config, "auto_map", None) or {}
    of_repositories = {name: code for name, code in auto_map.items() if "--" in str(code)}
    if auto_map:
        config.auto_map = of_repositories


def check_biases(model, source) -> None:
    """Raises for a routing bias that is not finite: it would send every token to the same experts."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias") and not all_finite(buffer):
            raise CheckpointError(f"{source}: {name} holds values that are not finite")


def with_mtp_copies(model, state_dict: dict) -> dict:
    """`state_dict` with each MTP module's copy of the embedding and the head, as DeepSeek publishes them."""
    state_dict = dict(state_dict)
    prefix = "model." if hasattr(model, "model") else ""
    embedding = state_dict.get(f"{prefix}embed_tokens.weight")
    head = state_dict.get("lm_head.weight", embedding if model.config.tie_word_embeddings else None)
    first = model.config.num_hidden_layers
    for layer in range(first, first + model.config.num_nextn_predict_layers):
        for name, tensor in zip(MTP_COPIES, (embedding, head), strict=True):
            # Offloaded weights have no values here; readers then share the main model's, as this package does.
            if tensor is not None and not tensor.is_meta:
                state_dict[f"{prefix}layers.{layer}.{name}"] = tensor.clone()
    return state_dict
