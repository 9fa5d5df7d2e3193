"""PruningPlan: what is kept of every layer, as a file that can be applied again and compared."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import read_file, write_json
from lightning_prune.support.validation import LIMIT, parse_json

FORMAT = 1
Index = Annotated[int, Field(ge=0, le=2**63 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class LayerPlan:
    """What layer ``layer`` keeps: ascending indices of KV heads (GQA groups) and of MLP channels.

    An empty list means that the block is skipped; two empty lists mean that the layer is removed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layer: Index
    kept_kv_heads: list[Index]
    kept_channels: list[Index]

    @property
    def removed(self) -> bool:
        """Whether nothing of the layer is kept."""
        return not (self.kept_kv_heads or self.kept_channels)

    def kept(self, block: Block) -> list[int]:
        """The kept units of one block."""
        return self.kept_kv_heads if block is Block.ATTENTION else self.kept_channels


@dataclass(frozen=True)
class PruningPlan:
    """The decision of a method for one base model (``plan.json``).

    ``pruning_ratio`` is the one that was requested; None where something else was (a number of layers).
    ``parameters`` counts unique elements (tied weights once) before and after. ``dtype`` is the dtype of the
    weights the plan was made for and applied to. ``weights_updated`` says that the method also changed the
    weights it keeps (SlimGPT's compensation, masks), so the plan alone cannot re-create the checkpoint.
    ``biases`` are config keys that are on in the pruned model and off in the dense one (FLAP's compensation): biases
    they bring along are zero where the method made none.
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

    @property
    def removed_layers(self) -> list[int]:
        """Indices of the layers that keep nothing."""
        return [layer.layer for layer in self.layers if layer.removed]

    def to_json(self) -> dict[str, Any]:
        """The content of ``plan.json``."""
        return {"format": FORMAT, **asdict(self), "removed_layers": self.removed_layers}

    def save(self, path: Path) -> None:
        """Write ``plan.json`` whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path, option: str = "--plan") -> "PruningPlan":
        """Read ``plan.json``, which ``option`` named.

        Raises:
            UserError: the file is missing, is not JSON, or is not a plan of this format.
        """
        subject = f"{option}: '{path}'"
        raw = parse_json(read_file(path, LIMIT, option), Any, subject)  # type: ignore[arg-type]
        if not isinstance(raw, dict) or repr(raw.get("format")) != str(FORMAT):  # true is no 1
            found = f"has format {raw.get('format')!r}" if isinstance(raw, dict) else "is no plan"
            raise UserError(f"{subject} {found}; this version reads format {FORMAT}.")
        fields = {key: value for key, value in raw.items() if key not in ("format", "removed_layers")}
        plan = parse_json(json.dumps(fields).encode(), cls, subject)
        if missing := sorted({"dense", "pruned"} - plan.parameters.keys()):
            raise UserError(f"{subject} is not valid: parameters.{missing[0]} is missing.")
        return plan
