"""Models in memory as the engine's sources and layered models, so that a test can cut without writing a checkpoint."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.checkpoint.cut import pruned_config
from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.checkpoint.pruned import NewWeights, PrunedSource
from lightning_prune.models.checkpoint import skeleton
from lightning_prune.models.layered import LayeredModel

CPU = torch.device("cpu")


class MemorySource:
    """Copies of a model's parameters; ``asked`` lists every name that was read, in order."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.parameters = model.state_dict()
        self.asked: list[str] = []

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """See ``models.sources.Source``."""
        self.asked += names
        return {name: self.parameters[name].detach().to(device=device, dtype=dtype, copy=True) for name in names}


def layered(
    model: PreTrainedModel, dtype: torch.dtype | None = None, onload: Literal["model", "layer"] = "layer"
) -> LayeredModel:
    """A model in memory as a layered model that reads its layers from there."""
    return LayeredModel(skeleton(model.config), MemorySource(model), dtype or model.dtype, CPU, onload)


def layered_cut(dense: PreTrainedModel, plan: PruningPlan, new_weights: NewWeights = lambda layer: {}) -> LayeredModel:
    """What ``plan`` leaves of a model in memory, in its own dtype."""
    source = PrunedSource(MemorySource(dense), dense, plan, new_weights)
    return LayeredModel(skeleton(pruned_config(dense.config, plan)), source, dense.dtype, CPU, "model")


def cut(dense: PreTrainedModel, plan: PruningPlan, new_weights: NewWeights = lambda layer: {}) -> PreTrainedModel:
    """The same as a whole ``transformers`` model in eval mode that can be trained; ``dense`` is not touched."""
    pruned = layered_cut(dense, plan, new_weights)
    pruned.load_all()
    net = pruned.net.requires_grad_(True)
    net.generation_config = dense.generation_config
    return net
