"""Buffers that stay float32 when a model is cast to half precision."""


class Float32BuffersMixin:
    """Keeps the buffers named in `float32_buffers` at their values through `.to(dtype)`, `.half()` and the like.

    A rotary frequency or a routing bias rounded to bfloat16 is a different model (FACTS T19); `nn.Module.to` would
    round both.
    """

    float32_buffers: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        kept = {name: self._buffers[name] for name in self.float32_buffers if self._buffers.get(name) is not None}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = self._buffers[name]
            if moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self
