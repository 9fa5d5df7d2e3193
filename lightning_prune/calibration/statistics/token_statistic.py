"""What every statistic of a calibration pass shares: which tokens count, how many there were, and the NaN check."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_prune.support.devices import widest


class TokenStatistic(Metric):
    """A sum over calibration ``tokens`` (int64 scalar: how many) that batch size, order of samples and number of
    processes do not change beyond rounding.

    States are summed over processes once and in place: torchmetrics' own reduction would hold a copy per process.
    """

    full_state_update = False
    tokens: Tensor

    def __init__(self, **sums: tuple[int, ...]) -> None:
        """``sums``: names and shapes of float64 states, fp32 on an accelerator without."""
        super().__init__(sync_on_compute=False)
        self._matrices: list[str] = []
        self._summed = False
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name, shape in sums.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def add_state(self, name: str, default: Any, dist_reduce_fx: Any = "sum", persistent: bool = False) -> None:
        """As of torchmetrics; ValueError for states that are not sums, which are all that ``reduced`` adds up."""
        if dist_reduce_fx != "sum":
            raise ValueError(f"{name}: found dist_reduce_fx={dist_reduce_fx!r}; states of a TokenStatistic are sums.")
        super().add_state(name, default, dist_reduce_fx, persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move the states to a device, where float64 sums get its ``widest`` dtype."""
        dtype = widest(fn(torch.zeros(())).device)
        for name, default in self._defaults.items():
            if isinstance(default, Tensor) and default.dtype == torch.float64:
                self._defaults[name] = default.to(dtype)
                setattr(self, name, getattr(self, name).to(dtype))
        return super()._apply(fn, exclude_state)

    def add_matrix_state(self, name: str, *shape: int) -> None:
        """An fp32 state of a weight's size, of which torchmetrics keeps no second copy as the default."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float32), dist_reduce_fx="sum")
        self._defaults[name] = torch.zeros((), dtype=torch.float32)
        self._matrices.append(name)

    def reduced(self) -> Tensor:
        """``compute`` over all processes; not through torchmetrics, which keeps a copy, and of one value a scalar."""
        if not self._summed and torch.distributed.is_initialized():
            for name in self._defaults:
                torch.distributed.all_reduce(getattr(self, name))
            self._summed = True
        value: Tensor = type(self).compute(self)
        return value

    def give_up(self) -> None:
        """Free the matrices now. A metric refers to itself, so that it would live until a garbage collection."""
        for name in self._matrices:
            setattr(self, name, torch.zeros((), dtype=torch.float32))

    def raise_if_not_finite(self, name: str) -> None:
        """Raise FloatingPointError, which begins with ``name``, where a value is NaN or infinite; of the value summed
        over processes, so that every process raises or none does."""
        value = self.reduced()
        if bad := int((~torch.isfinite(value)).sum()):
            raise FloatingPointError(
                f"{name}: {bad} of {value.numel()} values of {type(self).__name__} are NaN or infinite."
            )


def counted_samples(x: Tensor, weight: Tensor | None) -> Tensor:
    """The samples of x ``[B, ...]`` that count; weight ``[B]`` is 0 for those that only give every process equally
    many, 1 for the others; None counts all."""
    return (x if weight is None else x[weight > 0]).detach()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products of fp32 tensors in fp32: no TF32 and no autocast, which would both keep 10 bits or fewer."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
