"""Whether all outputs of the layers are finite, without waiting for the device after every batch."""

import torch
from torch import Tensor


class Overflow:
    """Remembers the names of tensors with NaN or infinite values until ``raise_if_any``."""

    def __init__(self) -> None:
        self._bad: dict[str, Tensor] = {}

    def watch(self, name: str, values: Tensor) -> None:
        """Take note of ``values`` of any shape; the sum of finite values is finite, and one pass makes it."""
        bad = ~torch.isfinite(values.detach().sum(dtype=torch.float32))
        self._bad[name] = self._bad[name] | bad if name in self._bad else bad

    def forget(self) -> None:
        """Begin anew."""
        self._bad.clear()

    def raise_if_any(self) -> None:
        """Raise FloatingPointError that names what overflowed first, in every process where it did in one."""
        first = next((name for name, bad in self._bad.items() if bool(bad)), None)
        self.forget()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            everywhere: list[str | None] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, first)
            first = next((name for name in everywhere if name is not None), None)
        if first is not None:
            raise FloatingPointError(f"{first}: NaN or infinite values.")
