"""The refit of what is kept, as an object that a method has (``refit_pass`` is the pass, ``refit_math`` the solver)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Pass, Step
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.methods.refit_pass import RefitPass, Target
from lightning_prune.models.vocabulary import OUTPUT_ROLE, Block
from lightning_prune.support.errors import UserError


@dataclass(frozen=True)
class Refit:
    """Least squares on what is kept of o_proj and down_proj.

    ``target``: what a projection is fitted to. ``damping``: λ; None chooses it on held-out samples, per projection.
    """

    target: Target
    damping: float | None

    @classmethod
    def of(cls, target: str, damping: float | Literal["auto"]) -> "Refit | None":
        """From the options ``refit`` and ``refit_damping``; None without a refit."""
        if damping != "auto" and not 0 < damping <= 100:
            raise UserError(f"--model.refit_damping: found {damping}; it must lie in (0, 100], or be auto.")
        if target == "none":
            return None
        return cls("residual" if target == "residual" else "output", None if damping == "auto" else damping)

    def passes(self, kept: list[LayerPlan], held_out: Tensor) -> list[Pass]:
        """The pass over the dense weights, for what is ``kept``; ``held_out`` bool ``[N]`` are samples to check on."""
        return [RefitPass(kept, self.target, self.damping, held_out)]

    def facts(self, results: Sequence[tuple[Step, LayerResult]]) -> dict[str, Any]:
        """What was fitted to what, with which damping, and what it did to the error on held-out samples."""
        fits = [
            {
                "layer": step.layer,
                "projection": OUTPUT_ROLE[Block(step.phase)],
                "target": result.facts["target"],
                "damping": result.facts["damping"] or None,  # None: left as it was
                "held_out_error": {"before": result.facts["before"], "after": result.facts["after"]},
            }
            for step, result in results
            if result.facts
        ]
        return {"target": self.target, "damping": "auto" if self.damping is None else self.damping, "fits": fits}
