"""Carry out a PruningPlan: a smaller model in memory, the same that the checkpoint gives back."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from lightning_prune.errors import UserError
from lightning_prune.surgery.anatomy import (
    LayerAnatomy,
    anatomy,
    family_of,
    head_dim_of,
    layers_of,
    projection_biases,
)
from lightning_prune.surgery.modeling_pruned import pruned_class
from lightning_prune.surgery.plan import LayerPlan, PruningPlan


def layout_of(model: PreTrainedModel) -> Literal["stock", "per-layer"]:
    """Whether stock tools load ``model``'s checkpoint as it is, or need the modeling file in its folder."""
    return "per-layer" if model.config.is_heterogeneous else "stock"


def cut(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """Remove GQA groups, MLP channels, blocks and layers; weights that stay keep their bits, dtype and device.

    The result has the class that loading its checkpoint gives. Use it in place of ``model``, whose layers
    are taken apart on the way so that dense and pruned weights never stand in memory together.

    Raises:
        UserError: the plan does not fit the model (``check_plan``), or the model cannot be pruned
            (``anatomy``). The model is then untouched.
    """
    layers = anatomy(model)
    check_plan(layers, plan)
    config = pruned_config(model.config, plan)
    device = model.device
    weights = _kept_weights(model, layers, plan)
    trainable = {name for name, parameter in weights.items() if parameter.requires_grad}
    with torch.device("meta"):
        pruned: Any = _class_for(model, config)(config)
    pruned.load_state_dict(weights, assign=True)  # the very Parameter objects, so tied ones stay tied
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(name in trainable)  # assigning switched all of them on
    # Rotary tables are not in the state dict; made anew on the CPU in fp32, as loading a checkpoint does.
    rotary = pruned.model.rotary_emb
    pruned.model.rotary_emb = type(rotary)(rotary.config).to(device)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.train(model.training)  # type: ignore[no-any-return]


def check_plan(layers: list[LayerAnatomy], plan: PruningPlan) -> None:
    """Check ``plan`` against the dense model's layers (those of a model on the meta device will do).

    Raises:
        UserError: another number of layers, indices that are not ascending or not there, or nothing left.
    """
    listed = [layer.layer for layer in plan.layers]
    if listed != list(range(len(layers))):
        raise UserError(
            f"--plan: the plan lists {len(listed)} layers ({_short(listed)}), the model has {len(layers)}, "
            f"numbered from 0. Use the model the plan was made for: '{plan.base_model}'."
        )
    for dense, kept in zip(layers, plan.layers, strict=True):
        _check_indices(kept.kept_kv_heads, dense.num_kv_heads, "kept_kv_heads", kept.layer, plan)
        _check_indices(kept.kept_channels, dense.num_channels, "kept_channels", kept.layer, plan)
    if len(plan.removed_layers) == len(layers):
        raise UserError(
            f"--plan: the plan removes all {len(layers)} layers; at least one must stay. Lower the pruning ratio."
        )


def parameters_after(layers: list[LayerAnatomy], dense: int, kept: list[LayerPlan]) -> int:
    """Unique parameters left of ``dense`` once ``kept`` is cut: units, and norms and biases of skipped blocks."""
    removed = 0
    for layer, plan in zip(layers, kept, strict=True):
        lost_groups = layer.num_kv_heads - len(plan.kept_kv_heads)
        lost_channels = layer.num_channels - len(plan.kept_channels)
        removed += lost_groups * layer.attention_unit_cost if plan.kept_kv_heads else layer.attention_block_cost
        removed += lost_channels * layer.mlp_unit_cost if plan.kept_channels else layer.mlp_block_cost
    return dense - removed


def pruned_config(config: Any, plan: PruningPlan) -> Any:
    """The config of what ``plan`` leaves of a model with ``config``, which is not changed.

    Stock where all layers left have the same widths and the family's config can say them, else with
    ``per_layer_config``.
    """
    family = family_of(config)
    left = [layer for layer in plan.layers if layer.kept_kv_heads or layer.kept_channels]
    pruned = copy.deepcopy(config)
    pruned.__dict__.pop("auto_map", None)
    pruned.head_dim = head_dim_of(config)
    pruned.num_hidden_layers = len(left)
    for name in family.per_layer_lists:
        if getattr(config, name, None) is not None:
            setattr(pruned, name, [getattr(config, name)[layer.layer] for layer in left])

    widths = {(len(layer.kept_kv_heads), len(layer.kept_channels)) for layer in left}
    queries_per_kv_head = config.num_attention_heads // config.num_key_value_heads
    if len(widths) == 1 and 0 not in (kv_channels := next(iter(widths))):
        kv_heads, channels = kv_channels
        heads = kv_heads * queries_per_kv_head
        needs_alias = family.stock_alias is not None and config.hidden_size % heads != 0
        if not (needs_alias and projection_biases(config)):
            pruned.num_attention_heads, pruned.num_key_value_heads = heads, kv_heads
            pruned.intermediate_size = channels
            return _as_alias(pruned, family.stock_alias) if needs_alias else pruned

    overrides = [_overrides(layer, config, queries_per_kv_head) for layer in left]
    # A config that checks its heads against hidden_size must be allowed to read the global number. Only
    # then: without the leave, stock loaders refuse the checkpoint at once.
    if family.stock_alias is not None and any(
        layer.get("num_attention_heads", config.num_attention_heads) != config.num_attention_heads
        for layer in overrides
    ):
        pruned.allow_global_per_layer_attribute_access = True
    pruned.per_layer_config = dict(enumerate(overrides))
    return pruned


def _overrides(layer: LayerPlan, config: Any, queries_per_kv_head: int) -> dict[str, Any]:
    found: dict[str, Any] = {"skip": []}
    if layer.kept_kv_heads:
        found["num_key_value_heads"] = len(layer.kept_kv_heads)
        found["num_attention_heads"] = len(layer.kept_kv_heads) * queries_per_kv_head
    else:
        found["skip"].append("attention")
        # Loaders that ignore ``skip`` would start this block at random; a size of its own makes them refuse.
        found["num_key_value_heads"] = 1 if config.num_key_value_heads != 1 else 2
    if layer.kept_channels:
        found["intermediate_size"] = len(layer.kept_channels)
    else:
        found["skip"].append("mlp")
        found["intermediate_size"] = 64 if config.intermediate_size != 64 else 128
    return found


def _as_alias(config: Any, model_type: str | None) -> Any:
    """``config`` in the words of the family that has the same arithmetic."""
    own = ("model_type", "attention_bias", "mlp_bias", "pretraining_tp", "architectures", "transformers_version")
    values = {key: value for key, value in config.to_dict().items() if key not in own}
    alias = CONFIG_MAPPING[model_type](**values | {"sliding_window": None})
    alias._attn_implementation_internal = config._attn_implementation
    alias.name_or_path = config.name_or_path
    return alias


def _class_for(model: PreTrainedModel, config: Any) -> Any:
    if config.is_heterogeneous:
        return pruned_class(type(model).__name__)
    if config.model_type == model.config.model_type:
        return type(model)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


@torch.no_grad()
def _kept_weights(model: PreTrainedModel, layers: list[LayerAnatomy], plan: PruningPlan) -> dict[str, nn.Parameter]:
    """The pruned model's state dict. Takes the layers out of ``model``."""
    family = family_of(model.config)
    del layers_of(model)[:]
    weights = dict(model.named_parameters(remove_duplicate=False))
    left = 0
    for dense, kept in zip(layers, plan.layers, strict=True):
        if kept.kept_kv_heads:
            _slice_attention(dense, kept.kept_kv_heads)
        else:
            delattr(dense.layer, family.attention)
            delattr(dense.layer, family.attention_norm)
        if kept.kept_channels:
            _slice_mlp(dense, kept.kept_channels)
        else:
            delattr(dense.layer, family.mlp)
            delattr(dense.layer, family.mlp_norm)
        if kept.kept_kv_heads or kept.kept_channels:
            for name, parameter in dense.layer.named_parameters():
                weights[f"{family.layers}.{left}.{name}"] = parameter
            left += 1
    return weights


def _slice_attention(layer: LayerAnatomy, kept_kv_heads: list[int]) -> None:
    device = layer.query.weight.device
    heads = torch.tensor(kept_kv_heads, device=device)
    rows = torch.arange(layer.key.out_features, device=device).view(layer.num_kv_heads, -1)[heads].flatten()
    query_rows = torch.arange(layer.query.out_features, device=device)
    query_rows = query_rows.view(layer.num_kv_heads, -1)[heads].flatten()
    for linear, index in ((layer.query, query_rows), (layer.key, rows), (layer.value, rows)):
        _keep_rows(linear, index)
    _keep_columns(layer.output, query_rows)


def _slice_mlp(layer: LayerAnatomy, kept_channels: list[int]) -> None:
    channels = torch.tensor(kept_channels, device=layer.gate.weight.device)
    _keep_rows(layer.gate, channels)
    _keep_rows(layer.up, channels)
    _keep_columns(layer.down, channels)


def _keep_rows(linear: nn.Linear, index: Tensor) -> None:
    linear.weight = _kept(linear.weight, 0, index)
    if linear.bias is not None:
        linear.bias = _kept(linear.bias, 0, index)


def _keep_columns(linear: nn.Linear, index: Tensor) -> None:
    linear.weight = _kept(linear.weight, 1, index)


def _kept(parameter: Tensor, dim: int, index: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.index_select(dim, index), requires_grad=parameter.requires_grad)


def _check_indices(indices: list[int], size: int, field: str, layer: int, plan: PruningPlan) -> None:
    if indices != sorted(set(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < size):
        raise UserError(
            f"--plan: layer {layer} has {field} {_short(indices)}; allowed are ascending numbers from 0 to "
            f"{size - 1}, each at most once. Use the model the plan was made for: '{plan.base_model}'."
        )


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, …, {values[-1]}]"
