"""What the package borrows from other libraries beyond what they document: each name, why, and the one way to it.

A release may move any of these without notice. `BORROWED` and `EXPORTED` are checked name by name in
`tests/test_borrowed_names.py`, and private names are used in this module alone, by the functions below. Files that are
exported to the Hub come without it and use theirs directly; `EXPORTED` says which they may. What runs need of Trainer,
accelerate and TRL is in `finetune/_compat.py`.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, return_and_correct_aliasing
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.distributed.utils import is_dtensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.quantizers import HfQuantizer

__all__ = ["is_dtensor", "is_traceable_wrapper_subclass", "return_and_correct_aliasing"]  # borrowed as they are

# The highest releases that the tests ran on, as in constraints.txt; the lowest are in tests/versions/lowest.txt.
HIGHEST_TRIED = {"transformers": "5.24.0", "peft": "0.21.2"}
_HANDED_OVER = "deepseek_moe_handed_over"
TO_COPY = torch.ops.aten._to_copy.default


class Borrowed(NamedTuple):
    """A name of another library.

    Attributes:
        module: that has it.
        name: dotted below the module. One that begins with a dot is set on objects: the module's source names it.
        reason: what it is borrowed for.
        parameters: that are passed to it, or taken in its place, by name.
    """

    module: str
    name: str
    reason: str
    parameters: tuple[str, ...] = ()


BORROWED = (
    # The experts interface, which kernels and expert LoRA serve.
    Borrowed("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS", "kernels are registered there by name"),
    Borrowed("transformers.integrations.moe", "_default_apply_gate", "kernels compute this gate themselves"),
    Borrowed("transformers.integrations.moe", "._apply_gate", "any other gate is called; tells the interface"),
    Borrowed("transformers.integrations.moe", "grouped_mm_experts_forward", '"sorted_mm" where it cannot sort'),
    Borrowed("transformers.activations", "SiLUActivation", "the activation that kernels compute themselves"),
    Borrowed("transformers.configuration_utils", "PreTrainedConfig._experts_implementation", "whose products to do"),
    # Auto classes.
    Borrowed("transformers.models.auto.configuration_auto", "CONFIG_MAPPING", "takes a type that a class has not"),
    Borrowed("transformers.models.auto.tokenization_auto", "TOKENIZER_MAPPING_NAMES", "tokenizers before 5.22"),
    # Attention implementations.
    Borrowed("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", '"mla_triton" is registered there'),
    Borrowed("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS", "a name without a mask sees padding"),
    Borrowed("transformers.masking_utils", "sdpa_mask", 'the mask of "mla_triton"'),
    Borrowed("transformers.integrations.sdpa_attention", "sdpa_attention_forward", '"mla_triton" when expanded'),
    Borrowed("transformers.configuration_utils", "PreTrainedConfig._attn_implementation", "the plan asks what runs"),
    # LoRA on stacked experts.
    Borrowed("peft.tuners.lora", "ParamWrapper", "base of the layer for experts; PEFT compares this class name"),
    Borrowed("peft.tuners.lora", "ParamWrapper._check_forward_args", "refuses what PEFT's does", ("x",)),
    Borrowed("peft.tuners.lora", "LoraConfig._register_custom_module", "puts the layer on experts", ("mapping",)),
    Borrowed("peft.tuners.lora", "ParamWrapper.update_layer", "adapters start expert by expert", ("config",)),
    Borrowed("peft.tuners.lora", "ParamWrapper.get_param", "the stacked weight of a wrapper"),
    Borrowed("peft.utils.integrations", "gather_params_ctx", "a weight that ZeRO-3 has cut up", ("param",)),
    Borrowed("peft.tuners.lora.layer", "_LoraParameterProxy", "its module tells PEFT's parametrizations from others"),
    # The same under expert parallelism.
    Borrowed("transformers.integrations.moe", "._is_expert_parallel", "tells experts whose tokens are exchanged"),
    Borrowed("peft.tuners.lora", "Linear.update_layer", "the width of a layer that FSDP has cut up"),
    Borrowed("transformers.distributed.utils", "is_dtensor", "without importing DTensor where there is none"),
    Borrowed("torch.distributed.tensor.placement_types", "_StridedShard", "factors with the experts innermost"),
    Borrowed("accelerate.hooks", "._hf_hook", "a hook that only moves inputs does not need PEFT's pass"),
    Borrowed("torch.nn.modules.module", "._forward_hooks", "modules with hooks are not passed over"),
    Borrowed("torch.nn.modules.module", "._forward_pre_hooks", "modules with hooks are not passed over"),
    Borrowed("torch.nn.modules.module", "._backward_hooks", "modules with hooks are not passed over"),
    Borrowed("torch.nn.modules.module", "._backward_pre_hooks", "modules with hooks are not passed over"),
    # Weights in four bits.
    Borrowed("transformers.quantizers", "HfQuantizer", "base of the quantizer"),
    Borrowed("transformers.quantizers", "HfQuantizer._process_model_before_weight_loading", "chooses kernels in time"),
    Borrowed("transformers.quantizers", "register_quantization_config", "lets from_pretrained take ours"),
    Borrowed("transformers.quantizers", "register_quantizer", "lets from_pretrained take ours"),
    Borrowed("transformers.utils.quantization_config", "QuantizationConfigMixin", "base of the configuration"),
    Borrowed("torch", "Tensor._make_wrapper_subclass", "a weight in the place of a tensor of other bytes"),
    Borrowed("torch", "_C.DisableTorchFunctionSubclass", "what is not F.linear goes to the dispatcher"),
    Borrowed("torch", "ops.aten._to_copy", "one of the three operations that such a weight has"),
    Borrowed("torch.utils._python_dispatch", "return_and_correct_aliasing", "what wrapper subclasses return"),
    Borrowed("torch.utils._python_dispatch", "is_traceable_wrapper_subclass", "kernels cannot read such weights"),
    Borrowed("transformers.models.auto.configuration_auto", "CONFIG_MAPPING_NAMES", "other types are ours"),
)

EXPORTED = (
    # Loading and saving (loading.py, checkpoint_layout.py, experts.py, multi_token.py).
    Borrowed(
        "transformers.modeling_utils",
        "PreTrainedModel._load_pretrained_model",
        "checks a checkpoint before a weight is read",
        ("model", "state_dict", "checkpoint_files", "load_config", "expected_keys"),
    ),
    Borrowed(
        "transformers.modeling_utils",
        "PreTrainedModel._finalize_model_loading",
        "refuses what the checkpoint lacks",
        ("model", "load_config", "loading_info"),
    ),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._auto_class", "whether code is saved along"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._hf_peft_config_loaded", "only an adapter is saved"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._keys_to_ignore_on_load_unexpected", "tied copies"),
    Borrowed("transformers.core_model_loading", "._weight_conversions", "dequantised FP8 is saved as plain weights"),
    Borrowed("transformers.integrations.finegrained_fp8", "Fp8Dequantize", "does not know ragged blocks; replaced"),
    Borrowed("transformers.core_model_loading", "WeightRenaming", "a user's key_mapping is one"),
    Borrowed(
        "transformers.conversion_mapping",
        "register_checkpoint_conversion_mapping",
        "stacks experts while loading",
        ("overwrite",),
    ),
    Borrowed("torch", "nn.Module._load_from_state_dict", "load_state_dict takes a checkpoint's names", ("prefix",)),
    # What PreTrainedModel reads of its subclasses (modeling_deepseek_moe.py).
    Borrowed("transformers.modeling_utils", "PreTrainedModel._init_weights", "routers and experts", ("module",)),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._no_split_modules", "device_map keeps layers whole"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._skip_keys_device_placement", "the cache stays put"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._supports_flash_attn", "attention by name"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._supports_sdpa", "attention by name"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._supports_flex_attn", "attention by name"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._supports_attention_backend", "attention by name"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._can_compile_fullgraph", "generate may compile"),
    Borrowed("transformers.modeling_utils", "._can_set_experts_implementation_cached_value", "found in no file text"),
    Borrowed("transformers.modeling_utils", "._can_set_attn_implementation_cached_value", "found in no file text"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._keep_in_fp32_modules_strict", "the routing bias"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._can_record_outputs", "hidden states, router logits"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._tied_weights_keys", "embedding and head"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._tp_plan", "the head under tensor parallelism"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._pp_plan", "the head under pipeline parallelism"),
    Borrowed("transformers.modeling_utils", "PreTrainedModel._fsdp_plan", "the head under FSDP"),
    # Forward passes.
    Borrowed("transformers.utils.generic", "merge_with_config_defaults", "use_cache and return_dict of the config"),
    Borrowed("transformers.utils.output_capturing", "capture_outputs", "output_hidden_states and the like"),
    Borrowed("transformers.utils.output_capturing", "OutputRecorder", "which module's output is which", ("index",)),
    Borrowed("transformers.utils", "can_return_tuple", "return_dict=False"),
    Borrowed("transformers.utils", "TransformersKwargs", "keywords that a forward passes on"),
    Borrowed("transformers.processing_utils", "Unpack", "keywords that a forward passes on"),
    Borrowed("transformers.modeling_outputs", "MoeModelOutputWithPast", "base of the outputs"),
    Borrowed("transformers.modeling_outputs", "MoeCausalLMOutputWithPast", "base of the outputs"),
    Borrowed("transformers.modeling_layers", "GenericForSequenceClassification", "forward of the head"),
    Borrowed("transformers.modeling_layers", "GenericForTokenClassification", "forward of the head"),
    Borrowed("transformers.loss.loss_utils", "ForCausalLMLoss", "the one loss that has a form in chunks"),
    Borrowed("transformers.utils.generic", "maybe_autocast", "router logits in float32", ("enabled",)),
    Borrowed("transformers.activations", "ACT2FN", "activations by name"),
    Borrowed("torch.nn.modules.module", "._forward_hooks", "a head with hooks is called"),
    Borrowed("torch.nn.modules.module", "._forward_pre_hooks", "a head with hooks is called; PEFT's adapter_names"),
    Borrowed("torch.nn.modules.module", "._backward_hooks", "a head with hooks is called"),
    Borrowed("torch.nn.modules.module", "._backward_pre_hooks", "a head with hooks is called"),
    Borrowed("torch.nn.modules.module", "._buffers", "buffers that stay float32"),
    Borrowed("torch", "nn.Module._apply", "buffers that stay float32", ("fn", "recurse")),
    Borrowed("torch", "Tensor._version", "deferred logits of a weight that has changed"),
    Borrowed("accelerate.hooks", "._hf_hook", "where an offloaded weight computes"),
    Borrowed("torch.nn.modules.module", "_has_any_global_hook", "a linear layer with hooks is called"),
    Borrowed("torch.nn.modules.module", "._compiled_call_impl", "a compiled linear layer is called"),
    Borrowed("torch.cpu", "_is_amx_tile_supported", "which rules hold for products on this CPU"),
    Borrowed("torch.cpu", "_is_avx512_bf16_supported", "which rules hold for products on this CPU"),
    Borrowed("torch", "ops.mkldnn._is_mkldnn_bf16_supported", "whether bfloat16 goes through float32"),
    Borrowed("torch", "ops.mkldnn._is_mkldnn_fp16_supported", "whether float16 goes through float32"),
    Borrowed("torch.nn.modules.module", "._is_replica", "nn.DataParallel loses counts and attached losses"),
    Borrowed(
        "torch.nn.parallel", "DistributedDataParallel._get_active_ddp_module", "idle weights take part under DDP only"
    ),
    # Attention, masks, experts and their implementations.
    Borrowed("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", "attention by name"),
    Borrowed("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS", "a name without a mask sees padding"),
    Borrowed("transformers.masking_utils", "sdpa_mask", 'the mask of "sdpa_cudnn"'),
    Borrowed(
        "transformers.masking_utils",
        "create_causal_mask",
        "the mask of every implementation",
        ("config", "inputs_embeds", "attention_mask", "position_ids"),
    ),
    Borrowed("transformers.configuration_utils", "PreTrainedConfig._attn_implementation", "attention by name"),
    Borrowed("transformers.integrations.sdpa_attention", "sdpa_attention_forward", '"sdpa_cudnn"'),
    Borrowed("transformers.models.llama.modeling_llama", "LlamaRMSNorm", "the norm that fused kernels replace"),
    Borrowed("transformers.models.llama.modeling_llama", "eager_attention_forward", "attention written out"),
    Borrowed("transformers.integrations", "use_experts_implementation", "experts by name"),
    Borrowed("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS", "whether the package's kernels are there"),
    Borrowed("transformers.utils", "is_flash_attn_2_available", 'attn_implementation="auto"'),
    Borrowed("transformers.utils", "is_flash_attn_3_available", 'attn_implementation="auto"'),
    Borrowed("transformers.utils", "is_flash_attn_4_available", 'attn_implementation="auto"'),
    Borrowed("transformers.utils.import_utils", "is_tracing", "a traced mask is not looked into"),
    # Generation.
    Borrowed("transformers.generation.continuous_batching", "PagedAttentionCache", "is updated by the attention"),
    Borrowed(
        "transformers.generation",
        "GenerationMixin._get_candidate_generator",
        "drafts by the modules in memory",
        ("generation_config", "input_ids", "logits_processor", "model_kwargs"),
    ),
    Borrowed("transformers.generation", "CandidateGenerator", "base of the one that drafts"),
)


def warn_of_untried_releases() -> None:
    """Warns if transformers or PEFT is of a later minor release than the tests ran on; names both versions."""
    newer = []
    for library, tried in HIGHEST_TRIED.items():
        try:
            installed = version(library)
        except PackageNotFoundError:  # on a server without PEFT the model runs, too
            continue
        if Version(installed).release[:2] > Version(tried).release[:2]:
            newer.append(f"{library} {installed} is installed, and {tried} is the latest that it was tried with")
    if newer:
        warnings.warn(
            f"deepseek-moe: {'; '.join(newer)}. Compare results before you rely on them, or install the older release",
            stacklevel=3,
        )


def read_tokenizers_as_they_are(model_types: Iterable[str]) -> None:
    """Lets AutoTokenizer take the `tokenizer.json` of these model types for what it says.

    DeepSeek's names the class `LlamaTokenizerFast`, of which transformers before 5.22 knows for its own `deepseek_v2`
    and `deepseek_v3` alone that it is not one: of any other type the file would be read with Llama's rules for spaces,
    and every text would get other ids than the model was trained on.
    """
    if Version(version("transformers")) < Version("5.22.0"):
        TOKENIZER_MAPPING_NAMES.update(dict.fromkeys(model_types, "TokenizersBackend"))


def follows_experts_interface(experts: nn.Module) -> bool:
    """Whether the class is one of transformers' experts interface, decorated and with a gate."""
    return hasattr(type(experts).forward, "__wrapped__") and hasattr(experts, "_apply_gate")


def apply_gate(experts: nn.Module, gate_up: torch.Tensor) -> torch.Tensor:
    """`[n, I]`, what the experts make of gate and up `[n, 2I]`."""
    return experts._apply_gate(gate_up)


def has_default_gate(experts: nn.Module) -> bool:
    """Whether that is the activated gate times up."""
    return experts._apply_gate.__func__ is _default_apply_gate


def experts_implementation(config: Any) -> str | None:
    """Name of the body that a model's experts run."""
    return getattr(config, "_experts_implementation", None)


def distributed_config(config: Any) -> Any:
    """The `DistributedConfig` that a model was loaded with, None if it was not."""
    return getattr(config, "distributed_config", None)


def is_expert_parallel(experts: nn.Module) -> bool:
    """Whether a rank has some of the experts whole, and the experts' forward brings it their tokens."""
    return getattr(experts, "_is_expert_parallel", False)


@contextmanager
def with_experts_body(experts: nn.Module, body: Callable[..., torch.Tensor]) -> Iterator[None]:
    """In it, the experts' forward computes by `body(experts, hidden_states, top_k_index, top_k_weights)`.

    The body's name is looked up in the experts' own config at every call, wherever what exchanges tokens has kept
    their forward.
    """
    config = experts.config
    experts.config = SimpleNamespace(_experts_implementation=_HANDED_OVER, body=body)
    try:
        yield
    finally:
        experts.config = config


def _handed_over(experts: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    return experts.config.body(experts, *inputs)


ALL_EXPERTS_FUNCTIONS.register(_HANDED_OVER, _handed_over)


def strided_shard(dim: int, split_factor: int) -> Any:
    """The DTensor placement that shards each of `split_factor` equal parts of a dimension."""
    from torch.distributed.tensor.placement_types import _StridedShard  # imported where processes are several

    return _StridedShard(dim, split_factor=split_factor)


def attention_implementation(config: Any) -> str | None:
    """Name of the attention that a model runs."""
    return config._attn_implementation


def check_forward_args(wrapper: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Raises for arguments that a PEFT layer does not support, as its own forward does."""
    wrapper._check_forward_args(x, *args, **kwargs)


def register_layers(lora_config: Any, layers: dict[type[nn.Module], Callable[..., nn.Module | None]]) -> None:
    """Lets PEFT put these layers on modules of the classes that are their keys."""
    lora_config._register_custom_module(layers)


def is_of_peft(parametrization: nn.Module) -> bool:
    """Whether PEFT put this parametrization on a weight."""
    return type(parametrization).__module__.startswith("peft.")


def has_hooks(module: nn.Module) -> bool:
    """Whether something happens around the module's forward or backward pass that passing over it would leave out.

    accelerate's hook on a module that stays on its device does not count: it only moves inputs there.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    offloads = getattr(getattr(module, "_hf_hook", None), "offload", True)
    return any(hooks) or ("forward" in vars(module) and offloads)


def make_wrapper(cls: type[torch.Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of class `cls` without numbers of its own."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def without_torch_function() -> AbstractContextManager[None]:
    """In it, functions of torch take a tensor of a subclass for a plain one, down to its `__torch_dispatch__`."""
    return torch._C.DisableTorchFunctionSubclass()


def with_operations(rule: WeightConverter, operations: list[ConversionOps]) -> WeightConverter:
    """A rule for the same tensors that does something else with them; a rule can copy itself from 5.21 on."""
    make = rule.copy if hasattr(rule, "copy") else WeightConverter
    return make(rule.source_patterns, rule.target_patterns, operations=operations)


class Quantizer(HfQuantizer):
    """transformers' quantizer with a public name for what is done to a model before its weights are read."""

    def before_loading(self, model: nn.Module) -> None:
        """Changes the model, which has no weights yet."""

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.before_loading(model)
