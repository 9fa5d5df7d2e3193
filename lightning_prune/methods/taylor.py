"""Taylor importance of groups (LLM-Pruner, Ma et al. 2023, section 3.2; first order as in its ``param_first``).

Removing a weight w changes the loss L by about |w·g|, g = ∂L/∂w. L is the mean token loss over the whole calibration
set, so g is summed with its sign and the absolute value is taken once, at the end.
"""

from dataclasses import replace

from torch import Tensor

from lightning_prune.calibration.backward import BackwardPass
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Holding, Load
from lightning_prune.calibration.statistics.gradients import LayerGradients
from lightning_prune.calibration.statistics.groups import group_importance
from lightning_prune.calibration.statistics.routed import RoutedTokens
from lightning_prune.methods.experts import with_experts
from lightning_prune.models.families import LayerStructure


class TaylorPass(BackwardPass):
    """I(G) = Σ |w·g| over every weight of the group."""

    name = "importance"

    def watch(self, view: LayerStructure) -> None:
        self.gradients = LayerGradients(view)
        self.routed = None if view.experts is None else RoutedTokens(view.experts).to(self.model.device)
        if (routed := self.routed) is not None:
            self._handle = routed.experts[0].module.register_forward_hook(
                lambda _, args, output: routed.update(*(part.detach() for part in args[:3]))
            )

    def expect(self, tokens: int) -> None:
        self.gradients.tokens = tokens

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """Memory of a backward pass, and an fp32 gradient of every weight of the layer, and the one just made."""
        base = super().holds(view, load)
        sums = 4 * load.layer_weights
        new = load.largest_parameter * load.dtype.itemsize
        return replace(base, running=base.running + sums + new, finishing=sums + 2 * load.largest_weight)

    def conclude(self, view: LayerStructure) -> LayerResult:
        """Importance per unit; the accumulators are freed one projection at a time."""
        gradients = self.gradients
        del self.gradients
        gradients.remove()

        def score(role: str) -> Tensor:
            return gradients.take(role).mul_(view.linears[role].weight).abs_()  # in place: as large as the weight

        importance = group_importance(view, score)
        if view.experts is None:
            return LayerResult(importance)
        self._handle.remove()
        products = {
            role: gradients.take(f"experts_{role}").mul_(weight).abs_()
            for role, weight in view.experts.weights().items()
        }
        part = view.experts.part
        channels = view.experts.channel_sums(lambda role, expert: part(role, expert, products))
        return with_experts(f"layer {view.index}", LayerResult(importance), self.routed, lambda _: channels)
