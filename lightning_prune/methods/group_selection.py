"""Which GQA groups and MLP channels are pruned: the options of a selection, and the selection they make."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from lightning_prune.checkpoint.scores import Flags, Scores
from lightning_prune.methods.scores import groups_that_stay
from lightning_prune.methods.selection import Budget, protect_best, select_global, select_uniform
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import ROLES_OF, Block
from lightning_prune.support.errors import UserError

Allocation = Literal["global", "uniform"]


@dataclass(frozen=True)
class GroupSelection:
    """Takes the lowest scores until the ratio is met; the fields are the options of ``GroupPruning``."""

    allocation: Allocation = "global"
    round_to: int = 1
    freeze_first_n_layers: int = 0
    freeze_last_n_layers: int = 0
    min_groups_per_layer: int = 0

    def __post_init__(self) -> None:
        for name, smallest in (
            ("round_to", 1),
            ("freeze_first_n_layers", 0),
            ("freeze_last_n_layers", 0),
            ("min_groups_per_layer", 0),
        ):
            if getattr(self, name) < smallest:
                raise UserError(f"--model.{name}: found {getattr(self, name)}; it must be {smallest} or more.")

    def frozen_layers(self, num_layers: int) -> set[int]:
        """Layers that are never candidates; they are still measured and counted."""
        last = num_layers - self.freeze_last_n_layers
        return {layer for layer in range(num_layers) if not self.freeze_first_n_layers <= layer < last}

    def select(
        self, scores: Scores, layers: list[LayerStructure], total_parameters: int, ratio: float, added: int = 0
    ) -> Flags:
        """Which units are pruned, bool ``[U]``.

        Args:
            scores: of U units.
            layers: of the dense model, for costs.
            total_parameters: of the dense model.
            ratio: share of them to remove.
            added: parameters that pruning brings along, to be removed in addition.

        Raises:
            UserError: the ratio cannot be reached.
        """
        overhead = {
            (view.index, block): view.block_cost(block) - view.units(block) * view.unit_cost(block)
            for view in layers
            for block in ROLES_OF
        }
        budget = Budget(total_parameters, ratio, overhead, self.round_to, added)
        frozen = self.frozen_layers(len(layers))
        free = ~np.isin(scores.layer, list(frozen))
        if not free.any():
            raise UserError(
                f"--model.freeze_first_n_layers {self.freeze_first_n_layers} and --model.freeze_last_n_layers "
                f"{self.freeze_last_n_layers} leave none of the {len(layers)} layers to prune."
            )
        free &= protect_best(scores, self.min_groups_per_layer)
        if layers[0].whole_attention is not None:
            free &= ~scores.of_kind(Block.ATTENTION)
        choose = select_global if self.allocation == "global" else select_uniform
        try:
            return choose(scores, free, budget)
        except UserError as error:
            raise UserError(f"{error}{groups_that_stay(layers)}") from None

    def facts(self) -> dict[str, Any]:
        """The options, for ``method.json``."""
        return asdict(self)
