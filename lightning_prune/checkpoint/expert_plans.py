"""What a plan keeps of experts: one number of experts and one width of all of them in the whole model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.models.experts import Experts
from lightning_prune.models.families import LayerStructure, family_of
from lightning_prune.models.vocabulary import EXPERTS, Block
from lightning_prune.support.errors import UserError


def as_planned(view: LayerStructure, plan: LayerPlan) -> LayerStructure:
    """``view`` with the units of experts that the plan counts in."""
    return next((view.with_experts_as(block) for block in EXPERTS if block in plan.kept), view)


def kept_experts(experts: Experts, plan: LayerPlan) -> tuple[list[int], Tensor | None]:
    """The experts that a layer keeps, and of each and of the shared ones its channels, int64 ``[E' + n, m']``;
    None where all have all."""
    every = list(range(experts.count))
    if Block.EXPERT in plan.kept:
        return plan.kept[Block.EXPERT], None
    units = torch.tensor(plan.kept[Block.EXPERT_CHANNEL], dtype=torch.int64)
    if len(units) == experts.total * experts.width:
        return every, None
    return every, units.view(experts.total, -1) % experts.width


def active_parameters(layers: Sequence[LayerStructure], total: int, kept: Sequence[LayerPlan]) -> int:
    """Number of parameters that one token passes, out of the ``total`` of the model that ``kept`` describes: all but
    the experts that its routers do not choose."""
    for dense_layer, plan in zip(layers, kept, strict=True):
        view = as_planned(dense_layer, plan)
        if (experts := view.experts) is None or plan.removed:
            continue
        units = {block: len(plan.kept.get(block, range(view.units(block)))) for block in EXPERTS}
        count = units[Block.EXPERT] or experts.count
        own = sum(parameter.numel() for parameter in experts.module.parameters()) // experts.count
        if units[Block.EXPERT_CHANNEL]:
            own -= (experts.width - units[Block.EXPERT_CHANNEL] // experts.total) * experts.channel_cost
        total -= (count - experts.top_k) * own
    return total


def parameter_counts(
    layers: Sequence[LayerStructure], dense: int, kept: Sequence[LayerPlan], left: int
) -> dict[str, int]:
    """``parameters`` of a plan: ``dense`` ones, those ``left``, and of both the active ones where there are experts."""
    counts = {"dense": dense, "pruned": left}
    if any(view.experts for view in layers):
        whole = [LayerPlan(view.index, view.all_units) for view in layers]
        counts["dense_active"] = active_parameters(layers, dense, whole)
        counts["pruned_active"] = active_parameters(layers, left, kept)
    return counts


def check_experts(layers: Sequence[LayerStructure], plans: Sequence[LayerPlan]) -> None:
    """Check what a plan keeps of experts, its indices being right.

    Raises:
        UserError: layers or experts keep different numbers, or fewer experts than the router chooses.
    """
    kept: dict[tuple[Block, int], int] = {}
    for view, plan in zip(layers, plans, strict=True):
        for block in EXPERTS:
            if (experts := view.experts) is None or block not in plan.kept or plan.removed:
                continue
            groups = experts.router_groups if block is Block.EXPERT else experts.total
            size, units = view.units(block) // groups, torch.tensor(plan.kept[block], dtype=torch.int64)
            counts = set(torch.bincount(units // size, minlength=groups).tolist())
            if block is Block.EXPERT and len(units) < experts.fewest:
                raise UserError(
                    f"--plan: layer {plan.layer} keeps {len(units)} experts; its router chooses {experts.top_k} for "
                    f"every token, so at least {experts.fewest} must be kept. Lower the pruning ratio."
                )
            if len(counts) != 1 or 0 in counts:
                raise UserError(
                    f"--plan: layer {plan.layer} keeps {min(counts)} to {max(counts)} {block} units of its "
                    f"{'router groups' if block is Block.EXPERT else 'experts'}; all must keep equally many. Change "
                    "the plan, or use the plan.json of a run."
                )
            kept[block, plan.layer] = counts.pop()
    if len({(block, count) for (block, _), count in kept.items()}) > 1:
        raise UserError(
            "--plan: layers keep different numbers of experts, or of channels inside them; a model has one number. "
            "Change the plan, or use the plan.json of a run."
        )


def set_sizes(config: Any, plans: Sequence[LayerPlan]) -> None:
    """Give ``config`` the number of experts and their width in ``plans``, of layers that are kept."""
    if (names := family_of(config).experts) is None:
        return
    sizes = {block: len(units) for plan in plans for block, units in plan.kept.items() if block in EXPERTS}
    if Block.EXPERT in sizes:
        setattr(config, names.count, sizes[Block.EXPERT])
    if Block.EXPERT_CHANNEL in sizes:
        total = getattr(config, names.count) + (getattr(config, names.shared_count) if names.shared else 0)
        setattr(config, names.width, sizes[Block.EXPERT_CHANNEL] // total)
