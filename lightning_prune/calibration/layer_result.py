"""The result of a finished layer: the one value that crosses from calibration to the methods."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_prune.models.vocabulary import Block

_TENSORS = ("importance", "weights", "biases", "factors")


@dataclass(frozen=True)
class LayerResult:
    """Result of one step of a pass."""

    importance: dict[Block, Tensor] = field(default_factory=dict)  # a value per unit [K], [F] or [1], fp32 or float64
    weights: dict[str, Tensor] = field(default_factory=dict)  # new ones by role, of the dense shape
    biases: dict[str, Tensor] = field(default_factory=dict)  # new [D] by role; no pass puts them in place meanwhile
    facts: dict[str, Any] = field(default_factory=dict)  # everything else, as plain JSON
    factors: dict[str, Tensor] = field(default_factory=dict)  # [d, d] by role, for a later pass (``Pass.result_of``)

    def on_host(self) -> "LayerResult":
        """The same with detached, contiguous tensors on the CPU."""
        tensors = {
            kind: {name: tensor.detach().cpu().contiguous() for name, tensor in getattr(self, kind).items()}
            for kind in _TENSORS
        }
        return replace(self, **tensors)

    def without_weights(self) -> "LayerResult":
        """A copy without new weights: the part kept in memory when the rest is on disk."""
        return LayerResult(self.importance, facts=self.facts)

    @property
    def new_parameters(self) -> dict[str, Tensor]:
        """New weights by role, and new biases as ``<role>.bias``."""
        return self.weights | {f"{role}.bias": bias for role, bias in self.biases.items()}

    def to_bytes(self) -> bytes:
        """A safetensors file: tensors as ``<kind>.<name>``, facts in its header."""
        tensors = {f"{kind}.{name}": tensor for kind in _TENSORS for name, tensor in getattr(self, kind).items()}
        return bytes(save(tensors, metadata={"facts": json.dumps(self.facts)}))

    @classmethod
    def from_file(cls, path: Path) -> "LayerResult":
        """Read what ``to_bytes`` gave; raises OSError, SafetensorError, KeyError or ValueError of a damaged file."""
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in _TENSORS}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                kind, _, rest = name.partition(".")
                parts[kind][rest] = file.get_tensor(name)
            facts = json.loads(file.metadata()["facts"])
        importance = {Block(name): values for name, values in parts["importance"].items()}
        return cls(importance, parts["weights"], parts["biases"], facts, parts["factors"])
