"""The refit of experts: the down projection of each on the tokens that the pruned model routes to it.

With R what the block of a token still lacks, g_e the weights of the k experts that were chosen, and G = Σ g_e: if
every chosen expert adds R/G to its output, the block adds R. Shared experts are always chosen, with g = 1. So expert e
is fitted to W_e·a_e + R/G, and its tokens count with g_e·G. By convexity the block's squared error is at most the sum
of the experts' own ones, with equality where nothing was fitted yet: where each improves, the block does, and no system
of all experts' channels has to be solved.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.statistics.token_statistic import full_precision
from lightning_prune.checkpoint.expert_plans import kept_experts
from lightning_prune.checkpoint.in_memory_plan import mask_experts
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.methods.refit_math import NormalEquations, add_completed, choose_damping, ridge, sum_over_processes
from lightning_prune.models.experts import ROLE, Experts

Routed = tuple[Tensor, Tensor, Tensor]


class ExpertRefit:
    """Sums and solves of one layer's experts.

    Args:
        experts: with their dense weights.
        kept: of the layer.
        damping: λ; None chooses it for every expert.
        dtype: of the normal equations.
    """

    def __init__(self, experts: Experts, kept: LayerPlan, damping: float | None, dtype: torch.dtype) -> None:
        self.experts, self.kept, self.damping = experts, kept, damping
        self.numbers, channels = kept_experts(experts, kept)
        self.device = experts.module.down_proj.device
        self.numbers = [*self.numbers, *range(experts.count, experts.total)]
        every = torch.arange(experts.width).expand(len(self.numbers), -1)
        self.channels = (every if channels is None else channels).to(self.device)
        self.place = {number: place for place, number in enumerate(self.numbers)}
        self.dense = experts.down_parameters()
        n, d = self.channels.shape[1], experts.hidden
        self.equations = [NormalEquations.zeros(n, d, dtype, self.device, damping) for _ in self.numbers]
        self.held: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.numbers]
        self.counts = torch.zeros(len(self.numbers), dtype=torch.int64, device=self.device)

    @contextmanager
    def pruned(self) -> Iterator[list[Routed]]:
        """The experts as the plan leaves them; gives what the experts module is called with meanwhile."""
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
        """Add a batch.

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
                self.held[place].append((inputs[held].cpu(), wanted[held].cpu()))
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
        experts, part = self.experts, self.experts.part
        shape = (experts.total, experts.hidden, experts.width)
        refitted = torch.zeros(shape, dtype=experts.module.down_proj.dtype, device=self.device)
        dampings: list[float | None] = []
        errors = torch.zeros(2, dtype=torch.float64)
        for place, number in enumerate(self.numbers):
            columns = self.channels[place]
            old = part("down", number)[:, columns].to(self.equations[place].gram.dtype)
            try:
                weight, damping, error = self._solve(place, old)
            except FloatingPointError as trouble:
                raise FloatingPointError(f"{name}, expert {number}: {trouble}") from None
            refitted[number][:, columns] = weight.to(refitted.dtype)
            dampings.append(damping)
            errors += torch.tensor(error, dtype=torch.float64)
        if not bool(torch.isfinite(refitted).all()):
            raise FloatingPointError(f"{name}: refitted weights overflow {refitted.dtype}.")
        tokens = self.counts.tolist()
        facts: dict[str, Any] = {"before": float(errors[0]), "after": float(errors[1])}
        facts["experts"] = {"numbers": self.numbers, "tokens": tokens, "damping": dampings}
        return LayerResult(weights={ROLE: refitted}, facts=facts)

    def _solve(self, place: int, old: Tensor) -> tuple[Tensor, float | None, tuple[float, float]]:
        """The weight, λ (0: better as it was, None: too few tokens), and the held-out error before and after."""
        equations, held = self.equations[place], self.held[place]
        self.held[place] = []
        sum_over_processes(equations.gram, equations.cross)
        if int(self.counts[place]) < old.shape[1]:
            return old, None, (0.0, 0.0)
        equations.complete()
        inputs = torch.cat([x for x, _ in held] or [old.new_zeros(0, old.shape[1])]).to(self.device)
        wanted = torch.cat([y for _, y in held] or [old.new_zeros(0, old.shape[0])]).to(self.device)
        with full_precision(self.device):
            damping, before, after = choose_damping(equations, old, inputs, wanted, self.damping)
            if damping:
                add_completed(equations, inputs, wanted)
                return ridge(equations, old, damping), damping, (before, after)
        return old, 0.0, (before, before)
