"""Experts in weight files: published folders hold three matrices per expert where the model has two parameters.

The parts are consecutive rows: gate and up of expert 0, of expert 1 …, and down of expert 0, of expert 1 …
"""

import re
from collections.abc import Mapping

from torch import Tensor

from lightning_prune.models.family import ExpertNames
from lightning_prune.models.weights import OPTION, TensorEntry
from lightning_prune.support.errors import UserError


def packed(tensors: Mapping[str, TensorEntry], names: ExpertNames) -> dict[str, TensorEntry]:
    """The stored tensors with the matrices of a parameter as one entry.

    Raises:
        UserError: the experts of a layer are not numbered from 0, lack a matrix, or differ in shape or dtype.
    """
    entries: dict[str, TensorEntry] = {}
    groups: dict[str, dict[tuple[int, int], TensorEntry]] = {}
    kinds = _matrices(names)
    numbered = re.compile(rf"(.*\.{names.experts})\.(\d{{1,6}})\.(\w+)\.weight")
    for name, entry in tensors.items():
        match = numbered.fullmatch(name)
        leaf = next((leaf for leaf, of in kinds.items() if match and match[3] in of), None)
        if match and leaf:
            parameter = groups.setdefault(f"{match[1]}.{leaf}", {})
            parameter[int(match[2]), kinds[leaf].index(match[3])] = entry
        else:
            entries[name] = entry
    return entries | {parameter: _joined(parameter, parts) for parameter, parts in groups.items()}


def stored_parts(name: str, tensor: Tensor, names: ExpertNames | None) -> list[tuple[str, Tensor]]:
    """A parameter as files hold it: its matrices by their names, views of it; itself where it is not of experts."""
    owner, _, leaf = name.rpartition(".")
    if names is None or owner.rpartition(".")[2] != names.experts or leaf not in (kinds := _matrices(names)):
        return [(name, tensor)]
    rows = tensor.shape[1] // len(kinds[leaf])
    return [
        (f"{owner}.{expert}.{kind}.weight", tensor[expert, index * rows : (index + 1) * rows])
        for expert in range(len(tensor))
        for index, kind in enumerate(kinds[leaf])
    ]


def _matrices(names: ExpertNames) -> dict[str, tuple[str, ...]]:
    """Parameter → the matrices of one expert in it, in order."""
    if names.stored is None:
        return {}
    *inner, down = names.stored
    return {"gate_up_proj" if len(inner) == 2 else "up_proj": tuple(inner), "down_proj": (down,)}


def _joined(parameter: str, parts: dict[tuple[int, int], TensorEntry]) -> TensorEntry:
    experts, kinds = (1 + max(place[index] for place in parts) for index in range(2))
    first = next(iter(parts.values()))
    alike = {(entry.dtype, entry.shape) for entry in parts.values()}
    if len(parts) != experts * kinds or len(alike) != 1 or len(first.shape) != 2:
        raise UserError(
            f"{OPTION}: the experts of '{parameter.rpartition('.')[0]}' are not {experts} matrices of one shape and "
            f"dtype for each of {kinds} projections, numbered from 0: {len(parts)} are there. Copy the model again."
        )
    rows, columns = first.shape
    places = tuple(place for _, entry in sorted(parts.items()) for place in entry.places)
    return TensorEntry(first.dtype, (experts, kinds * rows, columns), places)
