"""A linear layer, or the rows of one, by the role it has in a decoder layer."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(eq=False)
class Projection:
    """The part of a linear layer that has one role: all of it, or consecutive ``rows`` of its weight ``[rows, in]`` and
    bias where roles share a parameter."""

    module: nn.Linear
    rows: slice | None = None

    @property
    def weight(self) -> Tensor:
        """The weight ``[out_features, in_features]``: the parameter itself, or a view of it."""
        return self.part(self.module.weight)

    @weight.setter
    def weight(self, new: Tensor) -> None:
        if self.rows is not None:
            whole = self.module.weight.detach().clone()
            whole[self.rows] = new.detach()
            new = whole
        self.module.weight = nn.Parameter(new, requires_grad=False)

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[out_features]``, or None."""
        bias = self.module.bias
        return bias if bias is None else self.part(bias)

    @property
    def in_features(self) -> int:
        """Number of columns of the weight."""
        return self.module.in_features

    def part(self, whole: Tensor) -> Tensor:
        """The rows of this role of a tensor that is shaped like the layer's weight or bias."""
        return whole if self.rows is None else whole[self.rows]
