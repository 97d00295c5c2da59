"""What one layer keeps for the backward pass and needs while it computes: bytes, counted tensor by tensor.

Sizes come from modules on the meta device, adapted as the recipe says, so that what is trained or wrapped counts as it
is. N tokens in a micro-batch; a, s, w the bytes of a number in the products, in the residual stream and in the weights
(a and s differ under autocast). Only tensors that grow with N or with the weights are counted.
"""

from dataclasses import dataclass, replace

from torch import nn

from modeling_deepseek_moe._compat import attention_implementation
from modeling_deepseek_moe.kernels.held_bytes import (
    FLOAT,
    INDEX,
    ExpertsPass,
    HeldBytes,
    all_at_once_bytes,
    grouped_mm_bytes,
    one_by_one_bytes,
)

from ..model.chosen_experts import ChosenExperts


@dataclass(frozen=True)
class Shape:
    """One micro-batch.

    Attributes:
        batch, length: B rows of T tokens.
        product: a, bytes of a number in products: 2 under autocast or in half precision.
        stream: s, bytes of a number between layers.
        weight: w, bytes of a number of the routed experts.
        is_padded: rows differ in length or are packed, so that attention needs a mask.
        in_four_bits: frozen weights are dequantised for their products.
        device: "cuda", or "cpu", where the attention kernel wants values as wide as keys and experts take turns; one
            with instructions for half precision, without which attention keeps its tensors in float32.
        expert_ranks: ranks that share out the experts, with as many tokens for each.
    """

    batch: int
    length: int
    product: int
    stream: int
    weight: int
    is_padded: bool
    in_four_bits: bool
    device: str
    expert_ranks: int = 1

    @property
    def tokens(self) -> int:
        """N, rows times their length."""
        return self.batch * self.length

    @property
    def is_cast(self) -> bool:
        """Whether autocast copies operands of products."""
        return self.product != self.stream


@dataclass(frozen=True)
class Stage:
    """A part of the forward pass, in bytes.

    Attributes:
        name: what people read.
        saved: kept from its forward to its backward pass.
        forward, backward: needed besides while the one or the other computes.
        gradients: those of its trained parameters, which stay when its backward pass is over.
        casts: autocast's copies of trained weights, which live until the forward pass of the model ends.
        begins_branch: reads what the attention or feed-forward read, beside the stages before it.
    """

    name: str
    saved: int
    forward: int
    backward: int
    gradients: int
    casts: int = 0
    begins_branch: bool = False


def attention_stages(config, layer: nn.Module, shape: Shape) -> list[Stage]:
    """Norm and self-attention.

    projections  saved: the norm's x `[N, H]` in float32, and the normed x where the weight is trained; inputs of
                 linear layers (`linear_inputs`); of latent attention both latents' norms and the cached latent
                 backward: gradients of queries and of keys and values, and of the stream
    kernel       saved: queries and keys `[N, h, nope + rope]`, values, output, logsumexp `[N, h]` in float32, the mask
                 `[B, T, T]` where rows differ in length; eager: the weights `[B, h, T, T]`, twice
                 backward: gradients of output, queries, keys and values
    output       saved: its input; backward: gradients of that and of the stream
    """
    attention, tokens, a = layer.self_attn, shape.tokens, shape.product
    hidden, heads = config.hidden_size, config.num_attention_heads
    saved = norm(layer.input_layernorm, hidden, shape.stream, shape)
    if config.kv_lora_rank is None:
        key_width = value_width = config.head_dim
        saved += linear_inputs([attention.q_proj, attention.k_proj, attention.v_proj], hidden, shape.stream, shape)
        keys = values = up = tokens * config.num_key_value_heads * key_width * a
    else:
        key_width, value_width = config.qk_head_dim, config.v_head_dim
        rank, cached = config.kv_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim
        first = attention.q_proj if config.q_lora_rank is None else attention.q_a_proj
        saved += linear_inputs([first, attention.kv_a_proj_with_mqa], hidden, shape.stream, shape)
        if config.q_lora_rank is not None:
            saved += norm(attention.q_a_layernorm, config.q_lora_rank, a, shape)
            saved += linear_inputs([attention.q_b_proj], config.q_lora_rank, shape.stream, shape)
        # The normed latent is a part of its product's output, and of what is cached: the whole stays.
        saved += norm(attention.kv_a_layernorm, rank, a, shape, cached if a == FLOAT else rank)
        saved += linear_inputs([attention.kv_b_proj], rank, shape.stream, shape, cached)
        keys = tokens * heads * key_width * a
        up = tokens * heads * (config.qk_nope_head_dim + value_width) * a
        values = keys if pads_values(config, shape) else up
    queries = tokens * heads * key_width * a
    one_output = tokens * heads * value_width * a
    output = queries if pads_values(config, shape) else one_output
    kept = queries + keys + values + output + tokens * heads * FLOAT
    if shape.is_padded:
        kept += shape.batch * shape.length**2 * a
    if attention_implementation(config) == "eager":
        kept += shape.batch * heads * shape.length**2 * (FLOAT + a)
    into_output = linear_inputs([attention.o_proj], heads * value_width, a, shape)
    if output == one_output and keeps_itself(attention.o_proj, a):
        into_output -= one_output  # the kernel keeps it already
    stream = tokens * hidden * (FLOAT if has_adapters(attention) else shape.stream)
    of_output = trained_bytes(attention.o_proj)
    of_projections = trained_bytes(attention) - of_output + trained_bytes(layer.input_layernorm)
    of_casts = casts(attention.o_proj, shape)
    weight = dequantized(attention, shape)
    of_other_casts = casts(attention, shape) - of_casts
    backward = queries + up + 3 * stream + weight
    of_output_backward = one_output + 2 * stream + weight
    return [
        Stage("projections", saved, stream + weight, backward, of_projections, of_other_casts),
        Stage("attention", kept, queries + up, output + queries + keys + values + stream, 0),
        Stage("attention's output", into_output, stream + weight, of_output_backward, of_output, of_casts),
    ]


def pads_values(config, shape: Shape) -> bool:
    """Whether values are padded to the width of keys, and the output is cut to its own by a copy."""
    return shape.device == "cpu" and config.kv_lora_rank is not None and config.v_head_dim < config.qk_head_dim


def feed_forward_stages(config, layer: nn.Module, shape: Shape) -> list[Stage]:
    """Norm and feed-forward, dense or of experts.

    router    saved: the norm's x `[N, H]` in float32, and the normed x where a weight reads or makes it; scores
              `[N, E]`, once more for each balance loss; choices and weights `[N, K]`; the router's input in float32
              where it is trained
    routed    see `experts_bytes`; with experts on several ranks besides `[N K, H]` twice, the rows received and what
              became of those sent; forward: what is sent and comes back; backward: the gradients of all three
    gate, up  saved: both `[N, I]`; backward: their gradients and the stream's
    down      saved: silu(gate), its product with up; backward: gradients of product, silu(gate) and up
    """
    tokens, hidden = shape.tokens, config.hidden_size
    stream = tokens * hidden * shape.stream
    saved = norm(layer.post_attention_layernorm, hidden, shape.stream, shape)
    of_norm = trained_bytes(layer.post_attention_layernorm)
    if not layer.is_moe:
        gate_up, down = mlp_stages("a dense layer", layer.mlp, hidden, shape)
        gate_up = replace(gate_up, saved=gate_up.saved + saved, gradients=gate_up.gradients + of_norm)
        return [gate_up, down]
    block = layer.mlp
    router = base_of(block.gate)
    trains_router = any(p.requires_grad for p in block.gate.parameters())
    losses = bool(config.aux_loss_alpha) + bool(config.device_loss_alpha) + bool(config.communication_loss_alpha)
    saved += tokens * (router.num_experts * FLOAT * (1 + losses) + router.top_k * (INDEX + 3 * FLOAT))
    if trains_router and shape.stream != FLOAT and config.router_dtype == "float32":
        saved += tokens * hidden * FLOAT + router.weight.numel() * FLOAT
    saved += stream  # the experts' input
    kept, forward, backward = experts_bytes(config, block.experts, shape)
    of_experts = trained_bytes(block.experts) // shape.expert_ranks
    if shape.expert_ranks > 1:
        sent = tokens * config.num_experts_per_tok * hidden * shape.stream
        kept, forward, backward = kept + 2 * sent, forward + 2 * sent, backward + 3 * sent
    stages = [
        Stage("router", saved, stream, 3 * stream, trained_bytes(block.gate) + of_norm),
        Stage("routed experts", kept, forward, backward + 2 * stream, of_experts),
    ]
    if block.shared_experts is not None:
        gate_up, down = mlp_stages("the shared experts", block.shared_experts, hidden, shape)
        modules = block.shared_experts.gate_proj, block.shared_experts.up_proj
        if not shape.is_cast and any(keeps_itself(module, shape.stream) for module in modules):
            gate_up = replace(gate_up, saved=gate_up.saved - stream)  # they are kept for the routed experts
        stages += [replace(gate_up, begins_branch=True), down]
    return stages


def mlp_stages(name: str, mlp: nn.Module, hidden: int, shape: Shape) -> tuple[Stage, Stage]:
    """A SwiGLU layer: gate and up projection, then activation and down projection."""
    width = base_of(mlp.up_proj).out_features
    one = shape.tokens * width * shape.product
    stream = shape.tokens * hidden * shape.stream
    inputs = linear_inputs([mlp.gate_proj, mlp.up_proj], hidden, shape.stream, shape)
    product = linear_inputs([mlp.down_proj], width, shape.product, shape)
    of_down, of_casts = trained_bytes(mlp.down_proj), casts(mlp.down_proj, shape)
    wide = (shape.tokens * hidden * FLOAT if has_adapters(mlp) else 0) + dequantized(mlp, shape)
    gate_up = Stage(
        f"gate and up of {name}",
        inputs + 2 * one,
        stream,
        2 * one + 3 * stream + wide,
        trained_bytes(mlp) - of_down,
        casts(mlp, shape) - of_casts,
    )
    # When gradients of silu(gate) and up are made, the down projection's input is gone.
    backward = max(3 * one - product, one) + 2 * stream
    down = Stage(f"down of {name}", one + product, one + stream, backward, of_down, of_casts)
    return gate_up, down


def experts_bytes(config, experts: nn.Module, shape: Shape) -> HeldBytes:
    """What a layer's routed experts hold; `kernels/held_bytes.py` says what each of their bodies does.

    On GPUs experts without adapters are transformers' "grouped_mm", all others this package's own.
    """
    base = base_of(experts)
    pairs = shape.tokens * config.num_experts_per_tok
    run = ExpertsPass(
        shape.tokens,
        pairs,
        base.hidden_dim,
        base.intermediate_dim,
        base.num_experts // shape.expert_ranks,
        itemsize=shape.weight,
    )
    trained = [p for p in experts.parameters() if p.requires_grad]
    wrappers = [child for child in experts.modules() if hasattr(child, "parameter_name")]
    is_chosen, on_cpu = isinstance(experts, ChosenExperts), shape.device == "cpu"
    if not (wrappers or is_chosen or shape.in_four_bits or on_cpu):
        return grouped_mm_bytes(run, bool(trained))
    ranks = sum(len(A.weight) for wrapper in wrappers for A in wrapper.lora_A.values()) // base.num_experts
    size = shape.weight * sum(p.numel() for p in trained) // shape.expert_ranks
    # Factors are copied, and have their gradients in copies too; chosen experts have room for gradients.
    copied = (size, 2 * size) if wrappers else (0, size * is_chosen)
    if on_cpu or shape.in_four_bits:
        return one_by_one_bytes(run, ranks, copied, on_cpu, shape.in_four_bits)
    return all_at_once_bytes(run, ranks, copied)


def norm(module: nn.Module, width: int, itemsize: int, shape: Shape, stored: int | None = None) -> int:
    """What RMSNorm over `[N, width]` keeps: its input in float32 (a copy unless it is that already; `stored` numbers a
    token where it is a part of something), one number a token, and the normed input where the weight is trained."""
    kept = shape.tokens * ((stored or width) * FLOAT + FLOAT)
    return kept + shape.tokens * width * itemsize * module.weight.requires_grad


def linear_inputs(modules: list[nn.Module], width: int, itemsize: int, shape: Shape, stored: int | None = None) -> int:
    """What linear layers keep of the one input `[N, width]` that they share.

    A trained weight keeps the input: all such layers the same tensor, or under autocast a cast copy each. An adapter
    keeps its own copy in the factors' dtype (PEFT's are float32) unless the input has it, the mask and result of
    dropout, and `x A'` `[N, r]`. Under autocast a frozen or trained weight's copy is kept, too.
    """
    tokens, kept = shape.tokens, 0
    for module in modules:
        base = base_of(module)
        if shape.is_cast:
            is_copied = not base.weight.requires_grad and not shape.in_four_bits
            kept += base.weight.numel() * shape.product * is_copied
            kept += tokens * width * shape.product * base.weight.requires_grad
        for name, factor in getattr(module, "lora_A", {}).items():
            held = factor.weight.element_size()
            kept += tokens * len(factor.weight) * (shape.product if shape.is_cast else held)
            drops = getattr(module.lora_dropout[name], "p", 0) > 0
            if drops:
                kept += tokens * width * (held if shape.device == "cpu" else 1)
            if shape.is_cast:
                kept += tokens * width * shape.product
            elif drops or held != itemsize:
                kept += tokens * width * held
    if not shape.is_cast and any(keeps_itself(module, itemsize) for module in modules):
        kept += tokens * (stored or width) * itemsize
    return kept


def keeps_itself(module: nn.Module, itemsize: int) -> bool:
    """Whether a linear layer keeps its very input, without autocast."""
    factors = getattr(module, "lora_A", {})
    undropped = any(
        factor.weight.element_size() == itemsize and not getattr(module.lora_dropout[name], "p", 0)
        for name, factor in factors.items()
    )
    return base_of(module).weight.requires_grad or undropped


def casts(module: nn.Module, shape: Shape) -> int:
    """Bytes of autocast's copies of the trained weights of linear layers."""
    if not shape.is_cast:
        return 0
    linear = (child for child in module.modules() if isinstance(child, nn.Linear))
    return sum(layer.weight.numel() * shape.product for layer in linear if layer.weight.requires_grad)


def trained_bytes(module: nn.Module) -> int:
    """Bytes of the gradients of a module's trained parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def has_adapters(module: nn.Module) -> bool:
    """Whether a LoRA adapter is on the module or in it."""
    return any(hasattr(child, "lora_A") for child in module.modules())


def base_of(module: nn.Module) -> nn.Module:
    """The module that PEFT or ESFT has wrapped, or itself."""
    if isinstance(module, ChosenExperts):
        return module.experts
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def dequantized(module: nn.Module, shape: Shape) -> int:
    """Bytes of the largest weight of linear layers, which its product has as it was before quantisation."""
    if not shape.in_four_bits:
        return 0
    linear = (child for child in module.modules() if isinstance(child, nn.Linear))
    return max(layer.weight.numel() for layer in linear) * shape.product
