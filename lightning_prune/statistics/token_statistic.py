"""What every statistic of a calibration pass shares: which tokens count, how many there were, and the NaN check."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenStatistic(Metric):
    """A sum over calibration tokens.

    States are reduced over processes by summing, so neither the batch size nor the order of samples nor the
    number of processes matters beyond rounding. ``tokens``: int64 scalar, the tokens this process counted.
    """

    full_state_update = False
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def raise_if_not_finite(self, name: str) -> None:
        """Check the statistic before anything is decided from it; ``name`` is the layer or module in the message.

        The value summed over processes is checked, so every process raises or none does.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        value = self.compute()
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise FloatingPointError(
                f"{name}: {bad} of {value.numel()} values of {type(self).__name__} are NaN or infinite: "
                "the activations overflowed. Use --trainer.precision 32-true or bf16-true."
            )


def counted_tokens(x: Tensor, weight: Tensor | None) -> Tensor:
    """Rows of x that count, ``[n, in]``, in sample order.

    Args:
        x: ``[B, ..., in]``, any floating dtype.
        weight: ``[B]``, 0 for samples that only fill up a batch, 1 for the others; None counts all.
    """
    if weight is not None:
        x = x[weight > 0]
    return x.detach().reshape(-1, x.shape[-1])


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
