"""PruningPlan: what is kept of every layer, as a file that can be applied again and compared."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import read_file, write_json
from lightning_prune.support.validation import LIMIT, parse_json

FORMAT = 2
# A layer of format 1: dense families alone, with attention and MLP in every layer.
FORMAT_1 = {"kept_kv_heads": Block.ATTENTION, "kept_channels": Block.MLP}
Index = Annotated[int, Field(ge=0, le=2**63 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class LayerPlan:
    """The units that layer ``layer`` keeps: for each of its blocks their ascending indices (a GQA group of attention, a
    channel of an MLP, the one unit of a mixer).

    An empty list means that the block is skipped; if all are empty, the layer is removed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layer: Index
    kept: dict[Block, list[Index]]

    @property
    def removed(self) -> bool:
        """Whether nothing of the layer is kept."""
        return not any(self.kept.values())


@dataclass(frozen=True)
class PruningPlan:
    """The decision of a method for one base model (``plan.json``).

    ``pruning_ratio`` is the one that was requested; None where something else was (a number of layers).
    ``parameters`` counts unique elements (tied weights once) before and after. ``dtype`` is that of the weights.
    ``weights_updated``: the method also changed the weights it keeps (SlimGPT's compensation, masks), so the plan alone
    cannot re-create the checkpoint. ``biases`` are config keys that are on in the pruned model and off in the dense one
    (FLAP's compensation): biases they bring along are zero where the method made none. ``keep``: whether the text model
    alone is written or, where that is possible, the ``whole`` model of several that the base holds.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    method: str
    pruning_ratio: Share | None
    achieved_ratio: Share
    parameters: dict[str, Index]
    calibration_fingerprint: str | None
    base_model: str
    layers: list[LayerPlan]
    dtype: str = "float32"
    weights_updated: bool = False
    biases: list[str] = field(default_factory=list)
    keep: Literal["text", "whole"] = "text"

    @property
    def removed_layers(self) -> list[int]:
        """Indices of the layers that keep nothing."""
        return [layer.layer for layer in self.layers if layer.removed]

    def to_json(self) -> dict[str, Any]:
        """The content of ``plan.json``."""
        fields = asdict(self)
        if self.keep == "text":  # nearly always; the file is as it was before there was a choice
            del fields["keep"]
        return {"format": FORMAT, **fields, "removed_layers": self.removed_layers}

    def save(self, path: Path) -> None:
        """Write ``plan.json`` whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path, option: str = "--plan") -> "PruningPlan":
        """Read ``plan.json``, which ``option`` named.

        Raises:
            UserError: the file is missing, is not JSON, or is not a plan of format 1 or 2.
        """
        subject = f"{option}: '{path}'"
        raw = parse_json(read_file(path, LIMIT, option), Any, subject)  # type: ignore[arg-type]
        known = ("1", str(FORMAT))
        if not isinstance(raw, dict) or repr(raw.get("format")) not in known:  # true is not 1
            fault = f"has format {raw.get('format')!r}" if isinstance(raw, dict) else "is not a plan"
            raise UserError(
                f"{subject} {fault}; this version reads the formats {' and '.join(known)}. Give the plan.json of a run."
            )
        layers = raw.get("layers")
        for layer in layers if raw["format"] == 1 and isinstance(layers, list) else []:
            if isinstance(layer, dict):  # what is missing is noticed below
                layer["kept"] = {block: layer.pop(key, None) for key, block in FORMAT_1.items()}
        fields = {key: value for key, value in raw.items() if key not in ("format", "removed_layers")}
        plan = parse_json(json.dumps(fields).encode(), cls, subject)
        if missing := sorted({"dense", "pruned"} - plan.parameters.keys()):
            raise UserError(f"{subject} is not valid: parameters.{missing[0]} is missing. Copy plan.json again.")
        return plan
