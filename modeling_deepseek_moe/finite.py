"""Whether tensors hold numbers alone: neither NaN nor infinity."""

import torch


def all_finite(values: torch.Tensor) -> bool:
    """Whether every value of a tensor, of any type, is a finite number; of a packed one, whether its parts' are.

    One pass without copies where a sum says so; values whose sum is beyond float32 are looked at one by one.
    """
    if hasattr(values, "__tensor_flatten__"):
        parts = (getattr(values, name) for name in values.__tensor_flatten__()[0])
        return all(all_finite(part) for part in parts if isinstance(part, torch.Tensor))
    if values.is_meta or not values.is_floating_point():
        return True
    if values.element_size() == 1:
        return bool(torch.isfinite(values.float()).all())
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())
