"""The linear layer of the model: `nn.Linear`, but for a few rows in bfloat16 on CPU, as decoding multiplies."""

import torch
import torch.nn.functional as F
from torch import nn

# A product of more rows computes long enough to hide how its weight is read.
_FEW_ROWS = 16


class DeepseekMoeLinear(nn.Linear):
    """Multiplies a few rows by reading the weight as it lies in memory.

    The time of such a product is that of reading the weight. For `x W'` oneDNN first packs `W'`, up to twice the time
    of reading it (measured on Xeon with AMX, oneDNN 3, one to sixteen rows); `(W x')'` is the same sum and packs `x'`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        weight, num_rows = self.weight, input.numel() // self.in_features
        is_plain = type(weight) is nn.Parameter and not torch.compiler.is_compiling()
        is_slow = weight.device.type == "cpu" and weight.dtype == input.dtype == torch.bfloat16
        if not (is_plain and is_slow and 0 < num_rows <= _FEW_ROWS) or self.bias is not None:
            return F.linear(input, weight, self.bias)
        return few_rows_linear(input.reshape(num_rows, -1), weight).view(*input.shape[:-1], -1)


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x W'`, `[n, out]`."""
    if len(x) == 1:
        return torch.mv(weight, x[0])[None]
    return (weight @ x.mT).mT.contiguous()
