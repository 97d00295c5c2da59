"""What flash attention computes, in plain torch, where its kernels cannot run: padding cut out, causal from the end.

`flash_by_name` registers it as `REFERENCE_FLASH`; like every flash implementation it gets a padding mask `[B, L]` or
none from transformers, and finds packed sequences by `cu_seq_lens_q` or, in a batch of one, by `position_ids`.
"""

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

REFERENCE_FLASH = "reference_flash"


def attend(queries, keys, values, scaling):
    """`[h, T, d]`, `[h, L, d]`, `[h, L, v]` -> `[h, T, v]`; the last query sees all keys."""
    scores = queries @ keys.transpose(1, 2) * scaling
    causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
    return scores.masked_fill(~causal, float("-inf")).softmax(-1) @ values


def reference_flash(
    module, query, key, value, attention_mask, scaling, position_ids=None, cu_seq_lens_q=None, **kwargs
) -> tuple[torch.Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.shape[2]
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    if attention_mask is not None:
        for row, real in enumerate(attention_mask.bool()):
            seen = len(real)
            asked = real[-length:]
            own = [tensor[row][:, :seen][:, real] for tensor in (key, value)]
            output[row, :, asked] = attend(query[row][:, asked], *own, scaling)
        return output.transpose(1, 2), None
    if cu_seq_lens_q is not None:
        starts = cu_seq_lens_q.tolist()
    elif len(query) == 1 and position_ids is not None and length == key.shape[2]:
        starts = [*torch.where(position_ids[0] == position_ids.min())[0].tolist(), length]
    else:
        rows = [attend(*row, scaling) for row in zip(query, key, value, strict=True)]
        return torch.stack(rows).transpose(1, 2), None
    flat = [tensor.transpose(0, 1).flatten(1, 2) for tensor in (query, key, value)]
    parts = [
        attend(*(tensor[:, begin:end] for tensor in flat), scaling)
        for begin, end in zip(starts, starts[1:], strict=False)
    ]
    return torch.cat(parts, dim=1).unflatten(1, (-1, length)).permute(1, 2, 0, 3), None


@pytest.fixture
def flash_by_name(monkeypatch) -> str:
    """The registered name. Set it on a config's `_attn_implementation_internal`: a model checks for the real ones."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, REFERENCE_FLASH, reference_flash)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, REFERENCE_FLASH, flash_attention_mask)
    return REFERENCE_FLASH
