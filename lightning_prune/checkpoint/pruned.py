"""The pruned model as a layered model of its own: parameters are cut from the dense ones when they are read."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.checkpoint.cut import check_plan, kept_part, pruned_config
from lightning_prune.checkpoint.expert_plans import kept_experts
from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.models.checkpoint import Checkpoint, skeleton
from lightning_prune.models.experts import ROLE
from lightning_prune.models.families import family_of, layer_configs, layer_structures, shapes_of
from lightning_prune.models.family import Family
from lightning_prune.models.layered import LayeredModel
from lightning_prune.models.sources import Source
from lightning_prune.models.vocabulary import ROLES

NewWeights = Callable[[int], dict[str, Tensor]]  # dense layer → new weights by role, of the dense shape


class PrunedSource:
    """Gives the parameters of the pruned model.

    Args:
        dense, net: parameters and modules of the dense model; of the modules the shapes are enough.
        plan: what is kept.
        new_weights: what the method made of the weights it keeps: by role the weight, and ``<role>.bias``.

    Raises:
        UserError: the plan does not fit the model.
    """

    def __init__(self, dense: Source, net: PreTrainedModel, plan: PruningPlan, new_weights: NewWeights) -> None:
        self.dense, self.new_weights = dense, new_weights
        self.layers, self.configs = layer_structures(net), layer_configs(net.config)
        self.family: Family = family_of(net.config)
        check_plan(self.layers, plan, net.config)
        self.added = {role for role in ROLES if self.family.bias_of(role) in plan.biases}
        self.left = [layer for layer in plan.layers if not layer.removed]

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """Read parameters as ``models.sources.Source`` does; names and layer numbers are those of the pruned model."""
        result: dict[str, Tensor] = {}
        new_of, prefix = cache(self.new_weights), f"{self.family.layers}."
        for name in names:
            if not name.startswith(prefix):
                result |= self.dense.read([name], dtype, device)
                continue
            number, _, inside = name.removeprefix(prefix).partition(".")
            kept = self.left[int(number)]
            whole = self._whole(kept.layer, inside, new_of(kept.layer), dtype, device).to(device=device, dtype=dtype)
            experts, own = self.layers[kept.layer].experts, self.family.name_in_experts(inside)
            if experts is not None and own is not None:
                result[name] = experts.kept_part(own, whole, *kept_experts(experts, kept))
            else:
                result[name] = kept_part(self.family, self.configs[kept.layer], kept, inside, whole)
        return result

    def _whole(
        self, layer: int, name: str, new: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device
    ) -> Tensor:
        """The parameter ``name`` of a dense layer before it is cut, with the parts in it that the method made anew."""
        path, _, kind = name.rpartition(".")
        roles = self.family.roles_at(path)
        if kind == "bias":
            new = {role: new[f"{role}.bias"] for role in roles if f"{role}.bias" in new}
        if len(roles) == 1 and roles[0] in new:  # nothing of the dense one is needed
            return new[roles[0]]
        if ROLE in new and (experts := self.layers[layer].experts) is not None:
            down = experts.down_parameters(new[ROLE])
            if (own := self.family.name_in_experts(name)) in down:
                return down[own]
        config = self.configs[layer]
        rows = {role: shape[0] for role, shape in shapes_of(config).items()}
        if kind == "bias" and self.added & set(roles):
            dense = torch.zeros(sum(rows[role] for role in roles))
        else:
            stored = f"{self.family.layers}.{layer}.{name}"
            dense = self.dense.read([stored], dtype, device)[stored]
        if not new.keys() & set(roles):
            return dense
        parts: tuple[Tensor, ...] = dense.split([rows[role] for role in roles])  # type: ignore[no-untyped-call]
        return torch.cat([new[role].to(part) if role in new else part for role, part in zip(roles, parts, strict=True)])


def open_pruned(dense: Checkpoint, plan: PruningPlan, new_weights: NewWeights = lambda layer: {}) -> LayeredModel:
    """A dense checkpoint pruned by ``plan``, on the CPU in the plan's dtype, one layer in memory at a time.

    Raises:
        UserError: the plan does not fit the model, or the weights do not fit its config.
    """
    source = PrunedSource(dense.source(), dense.meta, plan, new_weights)
    net = skeleton(pruned_config(dense.config, plan))
    return LayeredModel(net, source, getattr(torch, plan.dtype), torch.device("cpu"), "layer")
