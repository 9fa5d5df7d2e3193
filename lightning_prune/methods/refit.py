"""The options of a refit, and what ``method.json`` says of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Step
from lightning_prune.methods.refit_pass import Target
from lightning_prune.models.vocabulary import OUTPUT_ROLE, Block
from lightning_prune.support.errors import UserError


@dataclass(frozen=True)
class Refit:
    """Least squares on what is kept of o_proj and down_proj; ``damping``: λ, None chooses it as the pass says."""

    target: Target
    damping: float | None

    @classmethod
    def of(cls, target: Target | Literal["none"], damping: float | Literal["auto"]) -> "Refit | None":
        """From the options ``refit`` and ``refit_damping``; None without a refit."""
        if damping != "auto" and not 0 < damping <= 100:
            raise UserError(f"--model.refit_damping: found {damping}; it must lie in (0, 100], or be auto.")
        if target == "none":
            return None
        return cls(target, None if damping == "auto" else damping)

    def facts(self, results: Sequence[tuple[Step, LayerResult]]) -> dict[str, Any]:
        """What was fitted to what, with which damping, and what it did to the error on held-out samples."""
        fits = [
            {
                "layer": step.layer,
                "projection": OUTPUT_ROLE.get(Block(step.phase), "down of every expert"),
                "target": result.facts["target"],
                "damping": result.facts["damping"] or None,  # None: left as it was
                "held_out_error": {"before": result.facts["before"], "after": result.facts["after"]},
                **{name: result.facts[name] for name in ("experts",) if name in result.facts},
            }
            for step, result in results
            if result.facts
        ]
        dampings = [one for fit in fits if "experts" in fit for one in fit["experts"]["damping"]]
        if few := dampings.count(None):
            rank_zero_warn(
                f"{few} of {len(dampings)} experts saw fewer tokens than they keep channels and were not refitted; a "
                "larger --data.num_samples reaches more of them."
            )
        return {"target": self.target, "damping": "auto" if self.damping is None else self.damping, "fits": fits}
