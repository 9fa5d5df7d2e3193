"""Experts in weight files: published folders hold three matrices per expert where the model has two parameters.

The parts are consecutive rows: gate and up of expert 0, of expert 1 …, and down of expert 0, of expert 1 …
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lightning_prune.models.family import ExpertNames
from lightning_prune.models.weights import OPTION, TensorEntry
from lightning_prune.support.errors import UserError


def packed(tensors: Mapping[str, TensorEntry], names: ExpertNames) -> dict[str, TensorEntry]:
    """The stored tensors as the model has them: renamed, and the parts of a parameter as one entry.

    Raises:
        UserError: the experts of a layer are not numbered from 0, lack a matrix, or differ in shape or dtype.
    """
    entries: dict[str, TensorEntry] = {}
    groups: dict[str, dict[tuple[int, int], tuple[str, TensorEntry]]] = {}
    for stored, entry in tensors.items():
        name = _renamed(stored, names.renamed)
        if place := _place(name, names):
            parameter, expert, part = place
            groups.setdefault(parameter, {})[expert, part] = stored, entry
        else:
            entries[name] = entry if name == stored else replace(entry, parts=entry.parts or ((entry.file, stored),))
    for parameter, parts in groups.items():
        entries[parameter] = _joined(parameter, parts)
    return entries


def stored_parts(name: str, tensor: Tensor, names: ExpertNames | None) -> list[tuple[str, Tensor]]:
    """A parameter as files hold it: its parts by their names, views of it."""
    if names is None:
        return [(name, tensor)]
    renamed = [(new, old) for old, new in names.renamed]
    owner, _, leaf = name.rpartition(".")
    parts = _parts(names).get(leaf, ()) if owner.rpartition(".")[2] == names.experts.rpartition(".")[2] else ()
    if not parts:
        return [(_renamed(name, renamed), tensor)]
    rows = tensor.shape[1] // len(parts)
    return [
        (_renamed(f"{owner}.{expert}.{part}.weight", renamed), tensor[expert, index * rows : (index + 1) * rows])
        for expert in range(len(tensor))
        for index, part in enumerate(parts)
    ]


def _parts(names: ExpertNames) -> dict[str, tuple[str, ...]]:
    """Parameter → the matrices of one expert in it, in order."""
    if names.stored is None:
        return {}
    *inner, down = names.stored
    return {"gate_up_proj" if len(inner) == 2 else "up_proj": tuple(inner), "down_proj": (down,)}


def _place(name: str, names: ExpertNames) -> tuple[str, int, int] | None:
    """The parameter that a stored matrix belongs to, its expert, and which matrix of it; None for other tensors."""
    for leaf, parts in _parts(names).items():
        match = re.fullmatch(rf"(.*\.{names.experts})\.(\d{{1,6}})\.({'|'.join(parts)})\.weight", name)
        if match:
            return f"{match[1]}.{leaf}", int(match[2]), parts.index(match[3])
    return None


def _renamed(name: str, pairs: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _joined(parameter: str, parts: dict[tuple[int, int], tuple[str, TensorEntry]]) -> TensorEntry:
    experts, kinds = (1 + max(place[index] for place in parts) for index in range(2))
    alike = {(entry.dtype, entry.shape) for _, entry in parts.values()}
    first = next(iter(parts.values()))[1]
    if len(parts) != experts * kinds or len(alike) != 1 or len(first.shape) != 2:
        raise UserError(
            f"{OPTION}: the experts of '{parameter.rpartition('.')[0]}' are not {experts} matrices of one shape and "
            f"dtype for each of {kinds} projections, numbered from 0: {len(parts)} are there. Copy the model again."
        )
    order = [parts[expert, kind] for expert in range(experts) for kind in range(kinds)]
    rows, columns = first.shape
    places = tuple(place for stored, entry in order for place in entry.parts or [(entry.file, stored)])
    return TensorEntry(first.file, first.dtype, (experts, kinds * rows, columns), places)
