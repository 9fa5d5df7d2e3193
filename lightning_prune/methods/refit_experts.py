"""The refit of experts: the down projection of each on the tokens that the pruned model routes to it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.statistics.token_statistic import full_precision
from lightning_prune.checkpoint.expert_plans import kept_experts
from lightning_prune.checkpoint.in_memory_plan import mask_experts
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.methods.columns import in_columns, named
from lightning_prune.methods.refit_math import NormalEquations, fit, sum_over_processes
from lightning_prune.models.experts import ROLE, Experts

Routed = tuple[Tensor, Tensor, Tensor]


class ExpertRefit:
    """Sums and solves of one layer's experts.

    With R what the block of a token still lacks and G the sum of the weights g of its chosen experts: if each of them
    adds R/G to its output, the block adds R. So expert e is fitted to W_e·a_e + R/G, and its tokens count with g_e·G.
    By convexity the block improves where each expert does, and no system of all experts' channels has to be solved.

    Args:
        experts: with their dense weights.
        kept: of the layer.
        damping: λ; None chooses it for every expert.
        dtype: of the normal equations.
    """

    def __init__(self, experts: Experts, kept: LayerPlan, damping: float | None, dtype: torch.dtype) -> None:
        self.experts, self.kept, self.damping = experts, kept, damping
        routed, channels = kept_experts(experts, kept)
        self.device = experts.module.down_proj.device
        self.numbers = [*routed, *range(experts.count, experts.total)]
        every = torch.arange(experts.width).expand(len(self.numbers), -1)
        self.channels = (every if channels is None else channels).to(self.device)
        self.place = {number: place for place, number in enumerate(self.numbers)}
        self.dense = experts.down_parameters()
        n, d = self.channels.shape[1], experts.hidden
        self.equations = [NormalEquations.zeros(n, d, dtype, self.device, damping) for _ in self.numbers]
        self.held: dict[int, list[tuple[Tensor, Tensor]]] = {}  # of every expert, on the host
        self.counts = torch.zeros(len(self.numbers), dtype=torch.int64, device=self.device)

    @contextmanager
    def pruned(self) -> Iterator[list[Routed]]:
        """Within the block the experts compute as pruned by the plan; yields what the experts module is called with."""
        seen: list[Routed] = []
        mask_experts(self.experts, self.kept)
        handle = self.experts.module.register_forward_pre_hook(lambda _, args: seen.append(args[:3]))
        try:
            yield seen
        finally:
            handle.remove()
            self.experts.replace_down(self.dense)
            self.experts.route_to(None)

    def add(self, routed: Routed, missing: Tensor, fitted: Tensor, chosen: Tensor) -> None:
        """Add a batch to the sums of every expert.

        Args:
            routed: x ``[T, D]``, experts and weights ``[T, k]``.
            missing: R ``[T, D]``, fp32.
            fitted, chosen: bool ``[T]``, tokens to fit on and those held out.
        """
        hidden, index, weights = routed
        total = weights.float().sum(1, keepdim=True) + (self.experts.total - self.experts.count)
        for expert, rows, gate in self.experts.routed(index, weights):
            place = self.place[expert]
            columns, each = self.channels[place], total[rows]
            inner = self.experts.inner(expert, hidden[rows])[:, columns].float()
            root = (gate.float()[:, None] * each).sqrt()
            with full_precision(self.device):
                output = inner @ self.experts.part("down", expert)[:, columns].float().T
            inputs, wanted = root * inner, root * (output + missing[rows] / each)
            if bool((held := chosen[rows]).any()):
                self.held.setdefault(expert, []).append((inputs[held].cpu(), wanted[held].cpu()))
            use = fitted[rows]
            with full_precision(self.device):
                self.equations[place].add(inputs[use], wanted[use])
            self.counts[place] += int((use | held).sum())

    def conclude(self, name: str) -> LayerResult:
        """The refitted down projections ``[E, D, m]`` by ``ROLE``, zero in removed channels. An expert with fewer
        tokens than channels stays as it is.

        Raises:
            FloatingPointError: sums or weights are not finite; names layer and expert.
        """
        sum_over_processes(self.counts)
        experts = self.experts
        shape = (experts.total, experts.hidden, experts.width)
        refitted = torch.zeros(shape, dtype=experts.module.down_proj.dtype, device=self.device)
        dampings: list[float | None] = []
        before = after = 0.0
        for number, columns, equations, count in zip(
            self.numbers, self.channels, self.equations, self.counts.tolist(), strict=True
        ):
            weight = experts.part("down", number)[:, columns].to(equations.gram.dtype)
            damping = None
            with named(f"{name}, expert {number}"):
                if count >= len(columns):
                    fitted = fit(equations, weight, self.held.pop(number, []), self.damping)
                    weight, damping = fitted.weight, fitted.damping
                    before, after = before + fitted.before, after + fitted.after
                refitted[number] = in_columns(columns, weight, refitted[number])
            dampings.append(damping)
        tokens = self.counts.tolist()
        facts = {"numbers": self.numbers, "tokens": tokens, "damping": dampings}
        return LayerResult(weights={ROLE: refitted}, facts={"before": before, "after": after, "experts": facts})
