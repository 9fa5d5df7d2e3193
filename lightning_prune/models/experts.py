"""A block of experts as transformers runs those of every family: one interface over parameters ``[E, ...]``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.models.family import ExpertNames

DOWN = "down_proj"
ROLE = "experts.down"  # of all down projections of a block together, in ``LayerResult.weights``


class Experts:
    """The experts of one layer, in the module ``block``; their weights are there only while the layer is loaded.

    A router sends every token to k of E small MLPs of width m; hidden size D. For expert e with the input x, the inner
    activation is a = act(W_gate·x) ⊙ (W_up·x), its output f_e(x) = W_down·a, and the block adds up g_e·f_e(x) over the
    experts that the router chose, with its weights g. An MLP that sees every token, and whose width is a multiple of
    the experts' by the config, is n more experts, numbered after the E routed ones, with the weight 1 for every token.
    """

    def __init__(self, block: nn.Module, names: ExpertNames) -> None:
        self.names, self.block = names, block
        self.shared: Any = getattr(block, names.shared) if names.shared else None
        self.router: Any = block.get_submodule(names.router)
        self.module: Any = block.get_submodule(names.experts)
        self.inner_name = "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def count(self) -> int:
        """Number of routed experts, E."""
        return len(self.module.down_proj)

    @property
    def total(self) -> int:
        """Number of all experts, routed and shared, E + n."""
        return self.count + (0 if self.shared is None else self.shared.down_proj.in_features // self.width)

    @property
    def width(self) -> int:
        """Width of one expert (its channels), m."""
        return int(self.upright(self.module.down_proj).shape[-1])

    @property
    def hidden(self) -> int:
        """Hidden size of the model, D."""
        return int(self.upright(self.module.down_proj).shape[1])

    @property
    def top_k(self) -> int:
        """Number of routed experts per token, k."""
        return int(getattr(self.router.config, self.names.top_k) if self.names.top_k else self.router.top_k)

    @property
    def router_groups(self) -> int:
        """Groups of equally many experts that the router chooses among first; 1 where it has none."""
        return int(getattr(self.router, "num_group", None) or 1)

    @property
    def fewest(self) -> int:
        """Smallest number of experts to keep: k; with router groups enough for the groups chosen, and two per group to
        rank it."""
        if self.router_groups == 1:
            return self.top_k
        each: int = max(2, -(-self.top_k // int(self.router.topk_group)))
        return each * self.router_groups

    # Weights

    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters as they are: ``inner`` and ``down`` of all routed experts; ``gate``, ``up`` and ``out`` of the
        shared MLP."""
        routed = {"inner": getattr(self.module, self.inner_name), "down": self.module.down_proj}
        if self.shared is None:
            return routed
        linears = {"gate": self.shared.gate_proj, "up": self.shared.up_proj, "out": self.shared.down_proj}
        return routed | {name: linear.weight for name, linear in linears.items()}

    def part(self, role: str, expert: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """One expert's part of the weights, or of ``tensors`` shaped like them: ``inner``, W_gate and W_up in the order
        of the file ``[2m, D]`` (without a gate W_up alone ``[m, D]``), or ``down`` ``[D, m]``."""
        tensors = self.weights() if tensors is None else tensors
        if expert < self.count:
            return self.upright(tensors[role])[expert]
        own = slice((expert - self.count) * self.width, (expert - self.count + 1) * self.width)
        return tensors["out"][:, own] if role == "down" else torch.cat([tensors["gate"][own], tensors["up"][own]])

    def inner(self, expert: int, x: Tensor) -> Tensor:
        """a ``[T, m]`` of inputs x ``[T, D]``, as the model computes it."""
        bias = getattr(self.module, f"{self.inner_name}_bias")[expert] if self.module.has_bias else None
        product = functional.linear(x, self.part("inner", expert), bias)
        if expert >= self.count:
            gate, up = product.chunk(2, dim=-1)
            return self.shared.act_fn(gate) * up  # type: ignore[no-any-return]
        result: Tensor = self.module._apply_gate(product) if self.module.has_gate else self.module.act_fn(product)
        return result

    def output(self, expert: int, inner: Tensor) -> Tensor:
        """f_e ``[T, D]`` from a ``[T, m]``."""
        bias = self.module.down_proj_bias[expert] if self.module.has_bias else None
        return functional.linear(inner, self.part("down", expert), bias)

    def routed(self, index: Tensor, weights: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every expert that has tokens, their rows in the batch ``[t]`` and its weights g ``[t]``, from the router's
        choice ``[T, k]`` and its weights ``[T, k]``; the shared ones have all."""
        chosen = index.flatten()
        order = chosen.argsort(stable=True)
        start = 0
        for expert, tokens in enumerate(torch.bincount(chosen, minlength=self.count).tolist()):
            if tokens:
                places = order[start : start + tokens]
                yield expert, places // index.shape[1], weights.flatten()[places]
            start += tokens
        for expert in range(self.count, self.total):
            yield expert, torch.arange(len(index), device=index.device), weights.new_ones(len(index))

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
        """Sums of weight scores over every channel of every expert ``[E + n, m]``, fp32 or fp64. ``score``: ``inner``
        or ``down`` and an expert's number → the score of every weight of that ``part``, requested one at a time."""
        sums = []
        for expert in range(self.total):
            rows = score("inner", expert)
            total = self.paired(rows.sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32))).sum(0)
            del rows
            columns = score("down", expert)
            sums.append(total + columns.sum(0, dtype=torch.promote_types(columns.dtype, torch.float32)))
        return torch.stack(sums)

    def paired(self, rows: Tensor) -> Tensor:
        """Values of the rows of an ``inner`` part, ``[..., 2m]``, as those of gate and of up ``[2, ..., m]``; of up
        alone ``[1, ..., m]``."""
        if not self.module.has_gate:
            return rows[None]
        if self.module.is_concatenated:
            return torch.stack(rows.chunk(2, dim=-1))
        return torch.stack([rows[..., ::2], rows[..., 1::2]])

    def kept_part(self, name: str, tensor: Tensor, experts: Sequence[int], channels: Tensor | None) -> Tensor:
        """The kept part of ``tensor``, the parameter ``name`` below the block: the routed ``experts``, and of each of
        these and the shared ones the ``channels``, int64 ``[E' + n, m']``; None keeps all."""
        owner, _, leaf = name.rpartition(".")
        if name in (whole := self._router_rows()):
            return self._rows(whole[name].shape, tensor, experts)
        if owner == self.names.experts:
            kept = self._rows(tensor.shape, tensor, experts)
            if channels is None or leaf == f"{DOWN}_bias":
                return kept
            return self._kept_channels(leaf, kept, channels[: len(experts)].to(tensor.device))
        shared, _, linear = owner.rpartition(".")
        if channels is None or self.shared is None or shared != self.names.shared or (linear, leaf) == (DOWN, "bias"):
            return tensor
        starts = self.width * torch.arange(self.total - self.count, device=tensor.device)[:, None]
        columns = starts + channels[len(experts) :].to(tensor.device)
        return tensor.index_select(1 if linear == DOWN else 0, columns.flatten())

    def _rows(self, shape: torch.Size, tensor: Tensor, experts: Sequence[int]) -> Tensor:
        """The experts' rows of a tensor, along the first dimension of ``shape`` that has one for each."""
        if len(experts) == self.count:
            return tensor
        return tensor.index_select(shape.index(self.count), torch.tensor(experts, device=tensor.device))

    def _kept_channels(self, leaf: str, tensor: Tensor, channels: Tensor) -> Tensor:
        index = channels
        if leaf != DOWN and self.module.has_gate:
            index = torch.cat([channels, channels + self.width], 1)
            if not self.module.is_concatenated:
                index = torch.stack([2 * channels, 2 * channels + 1], -1).flatten(1)
        if tensor.dim() == 2:
            return tensor.gather(1, index)
        axis, shape = 1 if (leaf == DOWN) == self.module.is_transposed else 2, list(tensor.shape)
        shape[axis] = index.shape[1]
        return tensor.gather(axis, index.unsqueeze(3 - axis).expand(shape))

    def down_parameters(self, down: Tensor | None = None) -> dict[str, Tensor]:
        """W_down by the names of its parameters below the block: as it is, or ``down`` ``[E + n, D, m]`` in their
        layout."""
        names = [f"{self.names.experts}.{DOWN}", *([f"{self.names.shared}.{DOWN}.weight"] if self.shared else [])]
        if down is None:
            return {name: self.block.get_parameter(name) for name in names}
        layouts = self.upright(down[: self.count]).contiguous(), down[self.count :].transpose(0, 1).flatten(1)
        return dict(zip(names, layouts, strict=False))

    def masked_down(self, keeps: Tensor) -> dict[str, Tensor]:
        """``down_parameters`` with zeros in channels that are not kept; ``keeps``: bool ``[E + n, m]``."""
        keeps = keeps.to(self.module.down_proj.device)
        masks = self.upright(keeps[: self.count, None]), keeps[self.count :].flatten()
        pairs = zip(self.down_parameters().items(), masks, strict=False)
        return {name: torch.where(mask, whole, torch.zeros_like(whole)) for (name, whole), mask in pairs}

    def replace_down(self, new: Mapping[str, Tensor]) -> None:
        """Put other ``down_parameters`` in place of the present ones."""
        for name, tensor in new.items():
            kept = self.block.get_parameter(name)
            set_tensor(self.block, name, nn.Parameter(tensor.to(kept), requires_grad=False))

    # Fewer experts, without cutting them

    def route_to(self, kept: Sequence[int] | None) -> None:
        """Let the router of a loaded layer know the experts ``kept`` alone, as if the others were cut out; None for
        all, as they were read."""
        unroute(self.module)
        if kept is None or len(kept) == self.count:
            return
        index = torch.tensor(kept, device=self.module.down_proj.device)
        whole = self._router_rows()
        for name, rows in whole.items():
            set_tensor(self.block, name, nn.Parameter(self._rows(rows.shape, rows, kept), requires_grad=False))
        before = getattr(self.router, "num_experts", None)
        self.router.num_experts = len(kept)

        def dense_numbers(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, chosen, *rest = args
            return (hidden, index[chosen], *rest)

        handle = self.module.register_forward_pre_hook(dense_numbers, prepend=True)

        def undo() -> None:
            handle.remove()
            self.router.num_experts = before
            for name, rows in whole.items():
                set_tensor(self.block, name, rows)

        self.module.undo_routing = undo

    def _router_rows(self) -> dict[str, Tensor]:
        """Tensors of the router with a row per expert, by their name below the block, which may hold some itself."""
        named = (*self.block.named_parameters(), *self.block.named_buffers())
        return {
            name: tensor
            for name, tensor in named
            if (name.startswith(f"{self.names.router}.") or "." not in name) and self.count in tensor.shape[:2]
        }

    def upright(self, tensor: Tensor) -> Tensor:
        """``[E, out, in]`` of a parameter, or a parameter of ``[E, out, in]``."""
        return tensor.transpose(1, 2) if self.module.is_transposed else tensor


def unroute(module: Any) -> None:
    """Take back ``Experts.route_to`` of an experts module, where there was one."""
    if (undo := module.__dict__.pop("undo_routing", None)) is not None:
        undo()


def set_tensor(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Another parameter or buffer in place of the one ``name`` below a module."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = value  # type: ignore[assignment]
