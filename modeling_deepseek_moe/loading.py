"""`from_pretrained` and `save_pretrained` of the family: nothing is silently initialised, dropped or renamed."""

import os

import torch
from safetensors import safe_open
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .checkpoint_files import CheckpointError, check_folder, check_tensors, read_header
from .checkpoint_layout import MTP_COPIES, REDUNDANT_TENSORS, is_mtp_tensor

logger = logging.get_logger(__name__)


class CheckpointMixin:
    """Checks a checkpoint before its tensors are read, and writes DeepSeek's own layout back."""

    _keys_to_ignore_on_load_unexpected = REDUNDANT_TENSORS

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads DeepSeek's own checkpoints of every generation, from a folder or the Hub; safetensors only.

        Raises:
            CheckpointError: files that are broken, incomplete, or do not fit the config; names file and tensors.
        """
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
        # A quantiser renames and reshapes tensors; transformers' own report covers those checkpoints. `expected_keys`
        # are given for an adapter, which goes on top of a model that is already there.
        if load_config.hf_quantizer is None and expected_keys is None:
            check_and_fit(model, state_dict, checkpoint_files, load_config)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

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
        if lost and load_config.hf_quantizer is None:
            raise CheckpointError(f"{load_config.pretrained_model_name_or_path} lacks {', '.join(sorted(lost))}")
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if new_heads:
            logger.warning(f"{type(model).__name__}: {', '.join(sorted(new_heads))} is new and must be trained")
        check_biases(model, load_config.pretrained_model_name_or_path)
        model.freeze_idle_mtp()
        return loading_info

    def save_pretrained(self, save_directory, *args, state_dict: dict | None = None, **kwargs):
        """As in transformers; MTP modules get their copies of embedding and head back."""
        if self._auto_class is None:
            drop_local_code(self.config)
        if self.config.num_nextn_predict_layers and not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = with_mtp_copies(self, self.state_dict() if state_dict is None else state_dict)
        return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)


def check_and_fit(model, state_dict, checkpoint_files, load_config) -> None:
    """Raises for a checkpoint that does not fit the model, and takes off MTP modules it does not have."""
    source = str(load_config.pretrained_model_name_or_path or "the state dict")
    file_of = {}
    if state_dict is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    else:
        shapes = {}
        for file in checkpoint_files:
            header = read_header(file) if str(file).endswith(".safetensors") else {}
            shapes |= header
            file_of |= dict.fromkeys(header, file)
    if not shapes:
        return
    scales = [name for name in shapes if name.endswith(".weight_scale_inv")]
    if scales:
        raise CheckpointError(
            f"{source} holds FP8 weights ({scales[0]}, ...) but its config has no quantization_config; "
            "add it, or convert the weights to bfloat16 first"
        )
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
    if of_repositories:
        config.auto_map = of_repositories
    elif auto_map:
        del config.auto_map


def check_biases(model, source) -> None:
    """Raises for a routing bias that is not finite: it would send every token to the same experts."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias") and not buffer.is_meta and not torch.isfinite(buffer).all():
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
