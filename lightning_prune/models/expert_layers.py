"""Which layers of a model have experts, read from its config and said in another one."""

from collections.abc import Sequence
from typing import Any

from lightning_prune.models.family import ExpertNames
from lightning_prune.support.errors import UserError


def has_experts(config: Any, names: ExpertNames | None, layer: int) -> bool:
    """Whether a layer has experts, in any of the ways in which configs say so; ``names``: of the family, if any."""
    if names is None or layer in (getattr(config, "mlp_only_layers", None) or ()):
        return False
    if (counts := getattr(config, "layers_num_experts", None)) is not None:
        return bool(counts[layer] > 1)
    first, last = getattr(config, names.dense_first or "", 0), getattr(config, "moe_layer_end_index", layer)
    step = getattr(config, "decoder_sparse_step", None) or getattr(config, "moe_layer_interval", None) or 1
    return bool(first <= layer <= last and (layer + 1) % step == 0)


class NoPeriodError(UserError):
    """Raised when layers of one kind are not at equal distances, the only thing the family's config can say."""


def say_period(target: Any, what: str, there: Sequence[bool]) -> None:
    """Let the keys ``<what>_period`` and ``<what>_offset`` of a config say which of its layers are of a kind. Raises
    NoPeriodError where no period does."""
    for period in range(1, len(there) + 2):
        for offset in range(period):
            if all((layer % period == offset) == own for layer, own in enumerate(there)):
                vars(target)[f"{what}_period"], vars(target)[f"{what}_offset"] = period, offset
                return
    places = ", ".join(str(layer) for layer, own in enumerate(there) if own)
    raise NoPeriodError(
        f"--plan: of the {len(there)} layers that are kept, those named by {what}_period and {what}_offset would be "
        f"{places}, which no period says. Remove no layers of family '{target.model_type}', or whole periods of them."
    )


def say_experts(target: Any, names: ExpertNames, there: Sequence[bool]) -> None:
    """Let a config say which of its layers have experts. Raises UserError where the family's config cannot."""
    if hasattr(target, "mlp_only_layers"):
        target.decoder_sparse_step, target.mlp_only_layers = 1, [i for i, own in enumerate(there) if not own]
    if hasattr(target, "expert_layer_period"):
        say_period(target, "expert_layer", there)
    if names.dense_first is None:
        return
    first = sum(not own for own in there)
    if any(there[:first]):
        raise UserError(
            f"--model.pretrained: this model has layers without experts after one with experts, which a config of "
            f"family '{target.model_type}' cannot say once a layer is removed. Such models are not pruned."
        )
    setattr(target, names.dense_first, first)
    if hasattr(target, "moe_layer_end_index"):
        target.moe_layer_end_index, target.moe_layer_interval = len(there) - 1, 1
