"""PruningPlan: what is kept of every layer, as a file that can be applied again and compared."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_prune.errors import UserError
from lightning_prune.files import write_json

FORMAT = 1


@dataclass(frozen=True)
class LayerPlan:
    """What layer ``layer`` keeps: ascending indices of KV heads (GQA groups) and of MLP channels.

    An empty list means that the block is skipped; two empty lists mean that the layer is removed.
    """

    layer: int
    kept_kv_heads: list[int]
    kept_channels: list[int]


@dataclass(frozen=True)
class PruningPlan:
    """The decision of a method for one base model (``plan.json``).

    ``parameters`` counts unique elements (tied weights once) before and after. ``dtype`` is the dtype of the
    weights the plan was made for and applied to. ``weights_updated`` says that the method also changed the
    weights it keeps (SlimGPT's compensation, masks), so the plan alone cannot re-create the checkpoint.
    """

    method: str
    pruning_ratio: float
    achieved_ratio: float
    parameters: dict[str, int]
    calibration_fingerprint: str | None
    base_model: str
    layers: list[LayerPlan]
    dtype: str = "float32"
    weights_updated: bool = False

    @property
    def removed_layers(self) -> list[int]:
        """Indices of the layers that keep nothing."""
        return [plan.layer for plan in self.layers if not plan.kept_kv_heads and not plan.kept_channels]

    def to_json(self) -> dict[str, Any]:
        """The plan as it stands in ``plan.json``."""
        return {"format": FORMAT, **asdict(self), "removed_layers": self.removed_layers}

    def save(self, path: Path) -> None:
        """Write ``plan.json`` whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "PruningPlan":
        """Read a plan.

        Raises:
            UserError: the file is missing, is not JSON, or is not a plan of this format.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"--plan: no file at '{path}'. Give the plan.json of a run folder.") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"--plan: '{path}' cannot be read as JSON ({error}).") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise UserError(f"--plan: '{path}' has format {found!r}; this version reads format {FORMAT}.")
        fields = {key: value for key, value in raw.items() if key not in ("format", "removed_layers")}
        try:
            fields["layers"] = [LayerPlan(**layer) for layer in fields["layers"]]
            plan = cls(**fields)
            _check_types(plan)
        except (KeyError, TypeError) as error:
            raise UserError(f"--plan: '{path}' is not a complete plan ({error}).") from None
        return plan


def _check_types(plan: PruningPlan) -> None:
    for layer in plan.layers:
        for field in (layer.kept_kv_heads, layer.kept_channels):
            if not isinstance(field, list) or not all(type(index) is int for index in field):
                raise TypeError(f"layer {layer.layer} keeps {field!r}, not a list of whole numbers")
    for side in ("dense", "pruned"):
        if type(plan.parameters[side]) is not int:
            raise TypeError(f"parameters.{side} is {plan.parameters[side]!r}, not a whole number")
