"""Methods whose decision can be followed by a refit of what is kept (``refit_pass``)."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from lightning_prune.calibration.passes import Pass
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.methods.base import PruningMethod, SavedMeasurement
from lightning_prune.methods.refit_pass import TARGETS, RefitPass
from lightning_prune.support.errors import UserError


class RefittingMethod(PruningMethod):
    """Removes structures, and may refit the projections that write to the residual stream.

    Args:
        pretrained: Model folder or hub id to prune. ``demo`` is the small model inside the package.
        pruning_ratio: Share of all parameters (embeddings and head included) to remove, between 0 and 1.
        refit: Refit what stays of o_proj and down_proj in every layer, by least squares on the calibration set.
            ``residual`` fits the residual stream to the dense model's, ``output`` each projection to its own output on
            the pruned model's inputs. The papers of these methods do not refit, so ``none`` is the default.
        refit_damping: λ, the pull of every column towards the old weight, times ‖x‖² of its input over the tokens.
            ``auto`` tries 0.001 to 1 for every projection on an eighth of the samples that it did not see.
        run_options: Options of every method.
    """

    decision_options = (*PruningMethod.decision_options, "refit", "refit_damping")

    def __init__(
        self,
        pretrained: str = "demo",
        pruning_ratio: float = 0.2,
        refit: Literal["none", "residual", "output"] = "none",
        refit_damping: float | Literal["auto"] = "auto",
        **run_options: Any,
    ) -> None:
        super().__init__(pretrained, pruning_ratio, **run_options)
        if refit_damping != "auto" and not 0 < refit_damping <= 100:
            raise UserError(f"--model.refit_damping: found {refit_damping}; it must lie in (0, 100], or be auto.")
        self.refit = refit
        self.refit_damping = refit_damping
        self.needs_calibration = type(self).needs_calibration or refit != "none"

    @property
    def label(self) -> str:
        """Another system than the one without a refit."""
        return self._label or (self.method if self.refit == "none" else f"{self.method}_refit")

    def reuse(self, saved: SavedMeasurement) -> None:
        """A refit reads the calibration set even where the scores are known."""
        super().reuse(saved)
        self.needs_calibration = self.refit != "none"

    def passes_behind(self, kept: list[LayerPlan], held_out: Callable[[], Tensor]) -> list[Pass]:
        """The refit, where it was asked for."""
        if self.refit == "none":
            return []
        return [RefitPass(kept, self.refit, None if self.refit_damping == "auto" else self.refit_damping, held_out())]

    def details(self) -> dict[str, Any]:
        """What was fitted to what, with which damping, and what it did to the error on held-out samples."""
        if self.refit == "none":
            return {"refit": None, **super().details()}
        steps = [(step, found) for step, found in self.walk.findings_of("refit") if found]
        fits = [
            {
                "layer": step.layer,
                "projection": "output" if step.phase == "attention" else "down",
                "target": TARGETS[int(found["target"])],
                "damping": float(found["damping"]) or None,  # None: left as it was
                "held_out_error": {"before": float(found["before"]), "after": float(found["after"])},
            }
            for step, found in steps
        ]
        return {"refit": {"target": self.refit, "damping": self.refit_damping, "fits": fits}, **super().details()}
