"""A PruningPlan as shapes: the config of the pruned model, its parameter count, and what is kept of every tensor."""

import copy
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from lightning_prune.checkpoint.expert_plans import as_planned, check_experts, set_sizes
from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.models.families import (
    LayerStructure,
    choose_layers,
    family_of,
    has_bias,
    head_dim_of,
    kv_heads_of,
    layer_configs,
    missing_biases,
    shapes_of,
    uniform_config,
    with_biases,
)
from lightning_prune.models.family import DENSE, OWN_HEADS, Family
from lightning_prune.models.modeling_pruned import BLOCK_MODULES, BLOCK_NORMS
from lightning_prune.models.vocabulary import BLOCK_OF, EXPERTS, OUTPUT_ROLE, ROLES, Block
from lightning_prune.support.errors import UserError
from lightning_prune.support.quiet import quiet_transformers


def layout_of(config: Any) -> Literal["stock", "per-layer"]:
    """Whether stock tools load a checkpoint with this config as it is, or need the modeling file in its folder."""
    return "per-layer" if family_of(config).per_layer(config) else "stock"


def kept_part(family: Family, config: Any, kept: LayerPlan, name: str, tensor: Tensor) -> Tensor:
    """The part of a layer's parameter that is kept: ``tensor`` is the whole parameter ``name``, such as
    ``self_attn.q_proj.weight``; ``config`` is that of the layer before it is cut."""
    path, _, kind = name.rpartition(".")
    if family.per_head and name == f"{family.attention}.{family.per_head}":
        return _kept(tensor, 0, config.num_key_value_heads, kept.kept[Block.ATTENTION])
    roles = family.roles_at(path)
    if not roles or (block := BLOCK_OF[roles[0]]) not in kept.kept:  # attention may be a part of a mixer
        return tensor
    units = kv_heads_of(config) if block is Block.ATTENTION else getattr(config, family.width)
    left = kept.kept[block]
    if roles[0] == OUTPUT_ROLE[block]:
        return _kept(tensor, 1, units, left) if kind == "weight" else tensor
    if len(roles) == 1:
        return _kept(tensor, 0, units, left)
    shapes = shapes_of(config)
    parts: tuple[Tensor, ...] = tensor.split([shapes[role][0] for role in roles])  # type: ignore[no-untyped-call]
    return torch.cat([_kept(part, 0, units, left) for part in parts])


def _kept(tensor: Tensor, dim: int, units: int, kept: list[int]) -> Tensor:
    """The slices of units ``kept`` along ``dim``, which ``units`` equal slices divide."""
    if len(kept) == units:
        return tensor
    index = torch.tensor(kept, device=tensor.device)
    parts: Tensor = tensor.unflatten(dim, (units, -1))  # type: ignore[no-untyped-call]
    return parts.index_select(dim, index).flatten(dim, dim + 1)


def check_plan(layers: list[LayerStructure], plan: PruningPlan, config: Any) -> None:
    """Check ``plan`` against the dense model's layers (those of a model on the meta device will do) and config.

    Raises:
        UserError: another number of layers, indices that are not ascending or not there, nothing left, or biases that
            the family's config cannot say.
    """
    instead = f"Use the model the plan was made for: '{plan.base_model}'."
    listed = [layer.layer for layer in plan.layers]
    if listed != list(range(len(layers))):
        raise UserError(
            f"--plan: the plan lists {len(listed)} layers ({_short(listed)}), the model has {len(layers)}, "
            f"numbered from 0. {instead}"
        )
    layers = [as_planned(*pair) for pair in zip(layers, plan.layers, strict=True)]
    for dense, kept in zip(layers, plan.layers, strict=True):
        if kept.kept.keys() != dense.parts.keys():
            raise UserError(
                f"--plan: layer {kept.layer} lists {', '.join(kept.kept) or 'nothing'}, the model's has "
                f"{', '.join(dense.blocks)}. {instead}"
            )
        if kept.kept.get(Block.MIXER) == [] and not kept.removed:
            raise UserError(
                f"--plan: layer {kept.layer} keeps a part without its mixer, which is removed only with the whole "
                "layer. Keep the mixer, or no part of the layer."
            )
        for block, indices in kept.kept.items():
            size = dense.units(block)
            if indices != sorted(set(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < size):
                raise UserError(
                    f"--plan: layer {kept.layer} keeps {block} {_short(indices)}; allowed are ascending numbers from 0 "
                    f"to {size - 1}, each at most once. {instead}"
                )
    check_experts(layers, plan.layers)
    if unknown := sorted(set(plan.biases) - {key for key in missing_biases(config).values() if key}):
        raise UserError(
            f"--plan: biases {unknown} are not config keys that give this model a bias that it lacks. {instead}"
        )
    attention = [layer.index for layer in layers if Block.ATTENTION in layer.parts]
    if attention and set(attention) <= set(plan.removed_layers) and len(plan.removed_layers) < len(layers):
        raise UserError(
            f"--plan: the plan removes every layer with attention ({_short(attention)}); transformers cannot decode "
            "with a cache of mixers alone. Keep one of these layers."
        )
    if len(plan.removed_layers) == len(layers):
        raise UserError(
            f"--plan: the plan removes all {len(layers)} layers; at least one must be kept. Lower the pruning ratio."
        )


def unpruned(layers: list[LayerStructure]) -> list[LayerPlan]:
    """The plans of layers from which nothing is pruned."""
    return [LayerPlan(view.index, view.all_units) for view in layers]


def prunable_parameters(layers: list[LayerStructure]) -> int:
    """Number of parameters in units that may be removed one by one."""
    return sum(
        view.unit_cost(block) * view.units(block)
        for view in layers
        for block in view.scored
        if block is not Block.ATTENTION or not view.whole_attention
    )


def parameters_after(layers: list[LayerStructure], dense: int, kept: list[LayerPlan]) -> int:
    """Unique parameters left of ``dense`` after cutting, which also removes norms and biases of skipped blocks."""
    for dense_layer, plan in zip(layers, kept, strict=True):
        layer = as_planned(dense_layer, plan)
        if plan.removed:
            dense -= layer.cost
            continue
        for block in layer.blocks:
            units = len(plan.kept[block])
            dense -= (layer.units(block) - units) * layer.unit_cost(block) if units else layer.block_cost(block)
    return dense


def pruned_config(config: Any, plan: PruningPlan) -> Any:
    """The pruned model's config, from the one before (dense or with widths per layer): stock where all kept layers have
    the same widths and the family's config can say them, else with ``per_layer_config``."""
    config, family = uniform_config(config), family_of(config)
    left = [layer for layer in plan.layers if not layer.removed]
    pruned = with_biases(config, plan.biases)
    set_sizes(pruned, left)
    if not family.own_heads:
        pruned.head_dim = head_dim_of(config)
    choose_layers(pruned, config, [layer.layer for layer in left])

    dense, own_heads = layer_configs(config), set(OWN_HEADS if family.own_heads else ())
    sizes = [_sizes(layer, dense[layer.layer]) for layer in left]
    skips = [[str(block) for block, units in layer.kept.items() if not units] for layer in left]
    of_all = {name: {of[name] for of in sizes if name in of} for name in chain(*sizes) if name not in own_heads}
    names = family.experts
    if names and names.width == family.width and any(block in layer.kept for layer in left for block in EXPERTS):
        of_all.setdefault(family.width, set()).add(getattr(pruned, family.width))  # one key says both
    if not any(skips) and all(len(values) == 1 for values in of_all.values()):
        uniform = copy.deepcopy(pruned)
        for name, (value,) in of_all.items():
            setattr(uniform, name, value)
        if own_heads:
            uniform.per_layer_config = dict(enumerate(sizes))
        if (again := _read_again(uniform)) is not None and _entries(again) == _entries(uniform):
            return uniform
        if family.stock_alias is not None and not any(has_bias(pruned, role) for role in ROLES):
            return _as_alias(uniform, family.stock_alias)

    entries = [{"skip": skip, **of} for skip, of in zip(skips, sizes, strict=True)]
    pruned.per_layer_config = dict(enumerate(entries))
    norms = {block: [name for name in family.norms_of(block) if name] for block in DENSE}
    if norms != BLOCK_NORMS:
        pruned.block_norms = norms
    modules = {block: name for block in DENSE for name in family.modules_of(block)}
    if modules != BLOCK_MODULES:
        pruned.block_modules = modules
    if getattr(config, "logits_scaling", None):
        pruned.logit_scale = 1 / config.logits_scaling  # the name under which vLLM's transformers backend looks for it
    # A config that checks its heads against other sizes must be allowed to read the global number. Only then: without
    # the permission, stock loaders refuse the checkpoint at once.
    if (again := _read_again(pruned)) is None:
        pruned.allow_global_per_layer_attribute_access = True
    elif _entries(again) != _entries(pruned):
        pruned.kept_layer_types = pruned.layer_types
    return pruned


def _read_again(config: Any) -> Any | None:
    """The config after its own class wrote and read it; None where the class does not accept what it wrote."""
    with quiet_transformers():
        try:
            return type(config).from_dict(config.to_dict())
        except Exception:  # ValueError, errors of strict dataclasses and of per-layer attributes have no common base
            return None


def _entries(config: Any) -> list[Any]:
    """The per-layer entries of a config, of which Gemma 4's makes the last layer attend fully."""
    return [getattr(config, name, None) for name in family_of(config).per_layer_lists]


def _sizes(layer: LayerPlan, config: Any) -> dict[str, int]:
    """The widths of a layer, by config key, from its ``config`` before. A skipped block has a size of its own, so that
    loaders which ignore ``skip`` refuse the checkpoint instead of starting the block at random."""
    family, sizes = family_of(config), dict[str, int]()
    if Block.ATTENTION in layer.kept:
        kv_heads = len(layer.kept[Block.ATTENTION])
        sizes["num_key_value_heads"] = kv_heads or (1 if config.num_key_value_heads != 1 else 2)
        if kv_heads or family.own_heads:  # of which ``uniform_config`` takes the ratio
            ratio = config.num_attention_heads // kv_heads_of(config)
            sizes["num_attention_heads"] = sizes["num_key_value_heads"] * ratio
    if family.own_heads:
        sizes["head_dim"] = config.head_dim
    if Block.MLP in layer.kept:
        channels = len(layer.kept[Block.MLP])
        sizes[family.width] = channels or (64 if getattr(config, family.width) != 64 else 128)
    return sizes


def _as_alias(config: Any, model_type: str) -> Any:
    """``config`` as one of the family with the same arithmetic."""
    own = ("model_type", "attention_bias", "mlp_bias", "pretraining_tp", "architectures", "transformers_version")
    values = {key: value for key, value in config.to_dict().items() if key not in own}
    alias = CONFIG_MAPPING[model_type](**values | {"sliding_window": None})
    alias._attn_implementation_internal = config._attn_implementation
    alias.name_or_path = config.name_or_path
    return alias


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, …, {values[-1]}]"
