"""Which attention implementation runs: the names to ask for, and `attn_implementation="auto"`.

Nothing is chosen unless it is asked for: without a name a model runs "sdpa". "auto" asks for `best_attention`, on
the first GPU that torch sees or else the CPU, and says what that chose. What the names do with MLA's heads, keys of
width 192 and values of 128:

| `attn_implementation` | (192, 128) heads | packed sequences | needs |
|---|---|---|---|
| `flash_attention_2` | values padded to 192 | in a batch of one row | Ampere or newer; `flash-attn` |
| `flash_attention_3` | values padded to 192 | in a batch of one row | Hopper; `flash-attn-3`; no dropout |
| `flash_attention_4` | padded to 192: Hopper only | in a batch of one row | `flash-attn-4`; no dropout |
| `sdpa_cudnn` | as they are | by a mask `[B, 1, T, T]` | Hopper, Blackwell; cuDNN 9.11 |
| `flex_attention` | as they are | by a mask of blocks | a compiler; no dropout; on CPU no backward |
| `mla_triton` | as they are | by a mask `[B, 1, T, T]` | Triton; Ampere or newer; latent attention |
| `sdpa` | on CPU values padded | by a mask `[B, 1, T, T]` | |
| `eager` | as they are | by a mask `[B, 1, T, T]` | memory for all scores |

The flash names and `sdpa_cudnn` compute in float16 or bfloat16. On a GPU "sdpa" leaves the kernel to torch, without a
word: cuDNN's on Hopper and Blackwell from cuDNN 9.15.1 on, else the memory-efficient one, as its flash kernel wants
values as wide as keys. The flash names find packed sequences in a batch of one row only, and a larger one is
refused. Decoding with latent attention is absorbed (`absorption.py`) and the same for all names but "mla_triton",
which is "sdpa" with a kernel for that; "auto" never chooses it.

Sources: transformers 5.23 (`flash_attention_forward`, `_is_packed_sequence`), torch's `sdp_utils.cpp`, flash-attn-4
4.0.0b36 (`_validate_head_dims`). The order follows the GPU's generation; no timing stands behind it.
"""

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    logging,
)
from transformers.utils.import_utils import is_tracing

logger = logging.get_logger(__name__)

_HALF = (torch.float16, torch.bfloat16)
_CUDNN = SDPBackend.CUDNN_ATTENTION
_ORDER = ("flash_attention_3", "flash_attention_4", "sdpa_cudnn", "flash_attention_2", "sdpa")
_PACKED_ORDER = (
    *("flash_attention_3", "flash_attention_4", "flash_attention_2", "flex_attention"),
    *("sdpa_cudnn", "sdpa"),
)
_HALF_ONLY = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "sdpa_cudnn")
# Major compute capabilities: 8 Ampere and Ada, 9 Hopper, 10 to 12 Blackwell.
_MADE_FOR = {"flash_attention_2": (8, 9, 10, 11, 12), "flash_attention_3": (9,), "flash_attention_4": (9, 10, 11)}
_WIDEST = 256


def best_attention(config, device: torch.device | str | None = None, packed: bool = False) -> str:
    """The first name of `attention_backends` that can be used: pass it as `attn_implementation`."""
    reasons = attention_backends(config, device, packed)
    return next(name for name, reason in reasons.items() if reason is None)


def attention_backends(
    config, device: torch.device | str | None = None, packed: bool = False
) -> dict[str, str | None]:
    """The names worth using on a device, best first, each with the reason why it cannot be used, None if it can.

    Args:
        config: a DeepseekMoeConfig. Its `dtype` is the one the model will run in, float32 if it is None.
        device: what the model will run on; the first GPU that torch sees, else the CPU, if it is None.
        packed: whether several sequences will share a row: then names come first that need no mask of all pairs.
    """
    device = _default_device() if device is None else torch.device(device)
    if device.type != "cuda":
        return {"sdpa": None}
    order = _PACKED_ORDER if packed else _ORDER
    return {name: _not_worth(name, config, device) or _refusal(name, config, device) for name in order}


class AttentionNameMixin:
    """Attention implementations by name: knows "auto", and refuses a name that the model's heads cannot use."""

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The name to run, as transformers checks it.

        Raises:
            ValueError: the implementation cannot run heads of these widths on this machine's GPU.
        """
        if requested_attention == "auto":
            requested_attention = best_attention(self.config)
            logger.warning_once(f'attn_implementation="auto" chose "{requested_attention}"')
        name = super().get_correct_attn_implementation(requested_attention, is_init_check)
        if reason := _refusal(name, self.config, _default_device()):
            raise ValueError(f'attn_implementation="{name}" cannot be used: {reason}. Use "sdpa" or "auto"')
        return name


def is_all_ones(attention_mask: torch.Tensor | None) -> bool:
    """Whether this is a padding mask without padding. Traced, a mask is not looked into."""
    is_padding = attention_mask is not None and attention_mask.dim() == 2
    return is_padding and not is_tracing(attention_mask) and bool(attention_mask.all())


def check_packed_rows(config, position_ids: torch.LongTensor, rows: int) -> None:
    """Refuse packed sequences that transformers' flash forward would not keep apart.

    Args:
        config: its `_attn_implementation` is what runs, without `cu_seq_lens_q` and without a mask or cache.
        position_ids: `[rows, T]` or `[1, T]`; positions that start again mark packed sequences.
        rows: how many the batch has.

    Raises:
        ValueError: there are several rows, and sequences are packed into them.
    """
    name = config._attn_implementation
    if "flash" in name and rows > 1 and not is_tracing(position_ids) and (position_ids.diff(dim=-1) != 1).any():
        raise ValueError(
            f'attn_implementation="{name}" keeps packed sequences apart in a batch of one row, got {rows} rows: '
            'put all sequences into one row, as DataCollatorWithFlattening does, or use "sdpa" or "flex_attention"'
        )


def sdpa_cudnn_attention(
    module, query, key, value, attention_mask=None, **kwargs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' "sdpa" by cuDNN's kernel and no other.

    Raises:
        ValueError: the tensors are not float16 or bfloat16.
        RuntimeError: cuDNN cannot run them; torch says why in a warning.
    """
    if query.dtype not in _HALF:
        raise ValueError(
            f'attn_implementation="sdpa_cudnn" computes in float16 or bfloat16, not in {query.dtype}: '
            'load the model with dtype=torch.bfloat16, or use "sdpa"'
        )
    if key.shape[-2] == 1:
        # Nothing to weigh, and the one length that cuDNN does not take.
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    with sdpa_kernel(_CUDNN):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register("sdpa_cudnn", sdpa_cudnn_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa_cudnn", sdpa_mask)


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(config) -> torch.dtype:
    dtype = config.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32


def _widths(config) -> tuple[int, int]:
    """Widths of a head's keys and values."""
    if config.kv_lora_rank is None:
        return config.head_dim, config.head_dim
    return config.qk_head_dim, config.v_head_dim


def _not_worth(name: str, config, device: torch.device) -> str | None:
    """What speaks against a name that is not asked for by itself: not installed, made for another GPU or dtype."""
    available = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_4": is_flash_attn_4_available,
    }
    if name in available and not available[name]():
        return "its package is not installed"
    if torch.cuda.get_device_capability(device)[0] not in _MADE_FOR.get(name, range(100)):
        return f"it is not made for {_gpu(device)}"
    if name in _HALF_ONLY and _dtype(config) not in _HALF:
        return f"it computes in float16 or bfloat16, and the model is {_dtype(config)}"
    if name in ("flash_attention_3", "flash_attention_4", "flex_attention") and config.attention_dropout > 0:
        return f"it has no dropout, and attention_dropout is {config.attention_dropout}"
    keys, values = _widths(config)
    if name == "sdpa_cudnn" and keys == values:
        return f"sdpa has a flash kernel for heads with keys and values of {keys}"
    return None


def _refusal(name: str, config, device: torch.device) -> str | None:
    """Why an implementation cannot run a config's heads on a device, None if it can."""
    # An implementation registered from elsewhere may know it.
    if own := getattr(ALL_ATTENTION_FUNCTIONS.get(name), "refusal", None):
        return own(config, device)
    if name not in _HALF_ONLY:
        return None
    if device.type != "cuda":
        return "it needs an NVIDIA GPU, and torch sees none"
    keys, values = _widths(config)
    heads = f"heads with keys of {keys} and values of {values}"
    if name == "sdpa_cudnn":
        return None if _cudnn_takes(config, device) else f"this cuDNN does not take {heads} on {_gpu(device)}"
    # transformers pads the narrower one.
    width = max(keys, values)
    is_blackwell = torch.cuda.get_device_capability(device)[0] > 9
    widest = 128 if name == "flash_attention_4" and is_blackwell and width != _WIDEST else _WIDEST
    if width > widest or width % 8:
        return f"it does not take {heads}, padded to {width}, on {_gpu(device)}"
    return None


def _gpu(device: torch.device) -> str:
    return "a GPU of compute capability {}.{}".format(*torch.cuda.get_device_capability(device))


def _cudnn_takes(config, device: torch.device) -> bool:
    """torch's own answer, for a forward and backward pass."""
    dtype = _dtype(config) if _dtype(config) in _HALF else torch.bfloat16
    query, key, value = (
        torch.empty(1, config.num_attention_heads, 64, width, dtype=dtype, device=device, requires_grad=True)
        for width in (_widths(config)[0], *_widths(config))
    )
    return can_use_cudnn_attention(SDPAParams(query, key, value, None, config.attention_dropout, True, False))
