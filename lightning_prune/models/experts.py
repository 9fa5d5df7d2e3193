"""A block of experts: a router sends every token to k of E small MLPs, whose weights are three-dimensional parameters.

transformers runs all of them through one interface (``use_experts_implementation``), so that this file knows no family.
For expert e with the input x, its inner activation is a = act(W_gate·x) ⊙ (W_up·x), its output f_e(x) = W_down·a, and
the block adds up g_e·f_e(x) over the experts that the router chose, with its weights g.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.models.records import ExpertNames

DOWN = "down_proj"
ROLE = "experts.down"  # of all down projections of a block together, in ``LayerResult.weights``


class Routed(NamedTuple):
    """The tokens that one expert has received: their rows in the flattened batch ``[T]``, and its weights g ``[T]``."""

    expert: int
    rows: Tensor
    gate: Tensor


class Experts:
    """The experts of one layer; their weights are there only while the layer is loaded.

    E experts of width m, k per token, hidden size D.

    Args:
        block: the module that holds router and experts.
        names: where in it they are.
    """

    def __init__(self, block: nn.Module, names: ExpertNames) -> None:
        self.names = names
        self.router: Any = block.get_submodule(names.router)
        self.module: Any = block.get_submodule(names.experts)
        self.inner_name = "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def count(self) -> int:
        """E."""
        return len(self.down)

    @property
    def width(self) -> int:
        """m."""
        return int(self.upright(self.module.down_proj).shape[-1])

    @property
    def hidden(self) -> int:
        """D."""
        return int(self.upright(self.module.down_proj).shape[1])

    @property
    def top_k(self) -> int:
        """k."""
        return int(self.router.top_k)

    @property
    def router_groups(self) -> int:
        """Groups of equally many experts that the router chooses among first; 1 where it has none."""
        return int(getattr(self.router, "num_group", None) or 1)

    @property
    def fewest(self) -> int:
        """Experts that must be kept: k, of every router group enough for the groups chosen, and the two it is judged
        by."""
        if self.router_groups == 1:
            return self.top_k
        each: int = max(2, -(-self.top_k // int(self.router.topk_group)))
        return each * self.router_groups

    # Weights

    @property
    def down(self) -> Tensor:
        """W_down of all experts ``[E, D, m]``, a view of the parameter."""
        return self.upright(self.module.down_proj)

    @property
    def down_bias(self) -> Tensor | None:
        """``[E, D]``."""
        return self.module.down_proj_bias if self.module.has_bias else None

    @property
    def inner_weight(self) -> Tensor:
        """W_gate and W_up of all experts in the order of the file ``[E, 2m, D]``, or W_up alone ``[E, m, D]``."""
        return self.upright(getattr(self.module, self.inner_name))

    def weights(self) -> dict[str, nn.Parameter]:
        """The two parameters: ``inner`` and ``down``, as they are."""
        return {"inner": getattr(self.module, self.inner_name), "down": self.module.down_proj}

    def inner(self, expert: int, x: Tensor) -> Tensor:
        """a ``[T, m]`` of inputs x ``[T, D]``, as the model computes it."""
        bias = getattr(self.module, f"{self.inner_name}_bias")[expert] if self.module.has_bias else None
        product = functional.linear(x, self.inner_weight[expert], bias)
        result: Tensor = self.module._apply_gate(product) if self.module.has_gate else self.module.act_fn(product)
        return result

    def output(self, expert: int, inner: Tensor) -> Tensor:
        """f_e ``[T, D]`` from a ``[T, m]``."""
        bias = None if self.down_bias is None else self.down_bias[expert]
        return functional.linear(inner, self.down[expert], bias)

    def routed(self, index: Tensor, weights: Tensor) -> Iterator[Routed]:
        """The tokens of every expert that has any, from the router's choice ``[T, k]`` and its weights ``[T, k]``."""
        chosen = index.flatten()
        order = chosen.argsort(stable=True)
        start = 0
        for expert, tokens in enumerate(torch.bincount(chosen, minlength=self.count).tolist()):
            if tokens:
                places = order[start : start + tokens]
                yield Routed(expert, places // index.shape[1], weights.flatten()[places])
            start += tokens

    # Units

    @property
    def channel_cost(self) -> int:
        """Parameters of one channel of one expert: its rows with their biases, and its column."""
        names = [self.inner_name, DOWN, *([f"{self.inner_name}_bias"] if self.module.has_bias else [])]
        total: int = sum(getattr(self.module, name).numel() for name in names)
        return total // (self.count * self.width)

    @property
    def expert_cost(self) -> int:
        """Parameters of one expert: its weights and biases, and its row of the router."""
        own: int = sum(parameter.numel() for parameter in self.module.parameters())
        return (own + sum(vector.numel() for vector in self._router_rows().values())) // self.count

    def channel_sums(self, score: Callable[[str, int], Tensor]) -> Tensor:
        """Sums of weight scores over every channel of every expert ``[E, m]``, fp32 or fp64.

        Args:
            score: ``inner`` or ``down`` and the number of an expert → the score of every weight of its ``inner_weight``
                ``[2m, D]`` or ``down`` ``[D, m]``; requested one at a time.
        """
        sums = []
        for expert in range(self.count):
            rows = score("inner", expert)
            total = self.paired(rows.sum(-1, dtype=_wide(rows))).sum(0)
            del rows
            columns = score("down", expert)
            sums.append(total + columns.sum(0, dtype=_wide(columns)))
        return torch.stack(sums)

    def paired(self, rows: Tensor) -> Tensor:
        """Values of the rows of ``inner_weight``, ``[..., 2m]``, as those of gate and of up ``[2, ..., m]``; of up
        alone ``[1, ..., m]``."""
        if not self.module.has_gate:
            return rows[None]
        if self.module.is_concatenated:
            return torch.stack(rows.chunk(2, dim=-1))
        return torch.stack([rows[..., ::2], rows[..., 1::2]])

    def kept_part(self, name: str, tensor: Tensor, experts: Sequence[int], channels: Tensor | None) -> Tensor:
        """What is kept of a parameter or buffer of the block.

        Args:
            name: below the block, such as ``experts.down_proj``.
            tensor: whole.
            experts: those that are kept.
            channels: of each of them the kept ones, int64 ``[E', m']``; None for all.
        """
        owner, _, leaf = name.rpartition(".")
        if f"{owner}.".startswith(f"{self.names.router}."):
            rows = self._router_rows().get(name.removeprefix(f"{self.names.router}."))
            if rows is None or len(experts) == self.count:
                return tensor
            dim = tensor.shape.index(self.count)
            return tensor.index_select(dim, torch.tensor(experts, device=tensor.device))
        if owner != self.names.experts:
            return tensor
        kept = tensor if len(experts) == self.count else tensor[torch.tensor(experts, device=tensor.device)]
        if channels is None or leaf == f"{DOWN}_bias":
            return kept
        return self._kept_channels(leaf, kept, channels.to(tensor.device))

    def _kept_channels(self, leaf: str, tensor: Tensor, channels: Tensor) -> Tensor:
        upright = tensor if tensor.dim() == 2 else self.upright(tensor)
        if leaf == DOWN:
            parts = upright.gather(2, channels[:, None].expand(-1, upright.shape[1], -1))
        else:
            rows = channels
            if self.module.has_gate:
                m = upright.shape[1] // 2
                rows = torch.cat([channels, channels + m], 1)
                if not self.module.is_concatenated:
                    rows = torch.stack([2 * channels, 2 * channels + 1], -1).flatten(1)
            parts = upright.gather(1, rows if tensor.dim() == 2 else rows[..., None].expand(-1, -1, upright.shape[2]))
        return (parts if tensor.dim() == 2 else self.upright(parts)).contiguous()

    def as_parameter(self, down: Tensor) -> Tensor:
        """W_down ``[E, D, m]`` in the layout of the parameter."""
        return self.upright(down).contiguous()

    def replace_down(self, down: Tensor) -> None:
        """Put W_down ``[E, D, m]`` in place of the present one."""
        new = self.as_parameter(down).to(self.module.down_proj)
        self.module.down_proj = nn.Parameter(new, requires_grad=False)

    # Fewer experts, without cutting them

    def route_to(self, kept: Sequence[int] | None) -> None:
        """Let the router know the experts ``kept`` alone, as if the others were cut out; None for all as they were
        when the layer was loaded. The layer must be loaded."""
        unroute(self.module)
        if kept is None or len(kept) == self.count:
            return
        index = torch.tensor(kept, device=self.module.down_proj.device)
        whole = self._router_rows()
        for name, rows in whole.items():
            _put(self.router, name, rows.index_select(rows.shape.index(self.count), index))
        before = self.router.num_experts
        self.router.num_experts = len(kept)

        def dense_numbers(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, chosen, *rest = args
            return (hidden, index[chosen], *rest)

        handle = self.module.register_forward_pre_hook(dense_numbers, prepend=True)

        def undo() -> None:
            handle.remove()
            self.router.num_experts = before
            for name, rows in whole.items():
                _put(self.router, name, rows)

        self.module.undo_routing = undo

    def _router_rows(self) -> dict[str, Tensor]:
        """Tensors of the router with a row per expert, by their name below it."""
        named = (*self.router.named_parameters(), *self.router.named_buffers())
        return {name: tensor for name, tensor in named if self.count in tensor.shape[:2]}

    def upright(self, tensor: Tensor) -> Tensor:
        """``[E, out, in]`` of a parameter, or a parameter of ``[E, out, in]``."""
        return tensor.transpose(1, 2) if self.module.is_transposed else tensor


def unroute(module: Any) -> None:
    """Take back ``Experts.route_to`` of an experts module, where there was one."""
    if (undo := module.__dict__.pop("undo_routing", None)) is not None:
        undo()


def _put(router: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = router.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )
    else:
        module._buffers[leaf] = value


def _wide(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32
