"""The prunable weights of a decoder: its family's record (``models.records``) as one ``LayerStructure`` per layer."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_prune.models.records import FAMILIES, GUIDE, Family
from lightning_prune.models.refusals import ENCODER_DECODER, REFUSED, SEVERAL_MODELS
from lightning_prune.models.skipped import fill_skipped
from lightning_prune.models.vocabulary import OUTPUT_ROLE, ROLES, ROLES_OF, Block
from lightning_prune.support.errors import UserError

# Of the config of a checkpoint with widths per layer, beside these widths.
PER_LAYER_KEYS = (
    *("auto_map", "how_to_load", "block_norms", "logit_scale"),
    "allow_global_per_layer_attribute_access",
)


@dataclass(eq=False)
class Projection:
    """The part of a linear layer that has one role: all of it, or consecutive ``rows`` of its weight ``[rows, in]`` and
    bias where roles share a parameter."""

    module: nn.Linear
    rows: slice | None = None

    @property
    def weight(self) -> Tensor:
        """``[out_features, in_features]``: the parameter itself, or a view of it."""
        return self.part(self.module.weight)

    @weight.setter
    def weight(self, new: Tensor) -> None:
        if self.rows is not None:
            whole = self.module.weight.detach().clone()
            whole[self.rows] = new.detach()
            new = whole
        self.module.weight = nn.Parameter(new, requires_grad=False)

    @property
    def bias(self) -> Tensor | None:
        """``[out_features]``, None without one."""
        bias = self.module.bias
        return bias if bias is None else self.part(bias)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.module.in_features

    def part(self, whole: Tensor) -> Tensor:
        """This role's rows of a tensor that is shaped like the layer's weight or bias."""
        return whole if self.rows is None else whole[self.rows]


@dataclass(frozen=True)
class LayerStructure:
    """One decoder layer. K KV heads, r query heads per KV head, d = head_dim, F channels, D hidden size.

    Weights: query ``[K·r·d, D]``, key and value ``[K·d, D]``, output ``[D, K·r·d]``, gate and up ``[F, D]``,
    down ``[D, F]``. KV head j serves the contiguous query heads j·r … j·r + r − 1. ``mlp_entry`` is the first module
    after the residual stream between the blocks, the MLP itself or its norm. ``whole_attention``: why groups cannot be
    removed one by one, or None.
    """

    index: int
    layer: nn.Module
    attention: nn.Module
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    mlp: nn.Module
    gate: Projection
    up: Projection
    down: Projection
    attention_norms: tuple[nn.Module, ...]
    mlp_norms: tuple[nn.Module, ...]
    mlp_entry: nn.Module
    head_dim: int
    whole_attention: str | None = None

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return len(self.key.weight) // self.head_dim

    @property
    def queries_per_kv_head(self) -> int:
        """r, 1 for multi-head attention and where there is none."""
        return len(self.query.weight) // max(1, len(self.key.weight)) or 1

    @property
    def num_channels(self) -> int:
        """F."""
        return len(self.gate.weight)

    def units(self, block: Block) -> int:
        """K GQA groups or F MLP channels."""
        return self.num_kv_heads if block is Block.ATTENTION else self.num_channels

    def projection(self, block: Block) -> Projection:
        """The projection of a block that writes to the residual stream: o_proj or down_proj."""
        return self.linears[OUTPUT_ROLE[block]]

    def unit_cost(self, block: Block) -> int:
        """Parameters that are removed with one unit: its rows with their biases, and its columns; 0 without units."""
        *rows, columns = (self.linears[role] for role in ROLES_OF[block])
        tensors = [columns.weight, *(linear.weight for linear in rows), *(linear.bias for linear in rows)]
        return sum(tensor.numel() for tensor in tensors if tensor is not None) // max(1, self.units(block))

    def block_cost(self, block: Block) -> int:
        """Parameters that are removed with the whole block: all units, the output bias and the norms."""
        modules = (self.attention, *self.attention_norms) if block is Block.ATTENTION else (self.mlp, *self.mlp_norms)
        return sum(map(count_parameters, modules))

    @property
    def linears(self) -> dict[str, Projection]:
        """The seven projections by role: query, key, value, output, gate, up, down."""
        return {role: getattr(self, role) for role in ROLES}


def family_of(config: Any) -> Family:
    """The record for ``config.model_type``.

    Raises:
        UserError: no record; the message lists the known families, and says why where it is known.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    several = SEVERAL_MODELS if getattr(config, "sub_configs", None) else ""
    reason = REFUSED.get(str(model_type), several)
    if getattr(config, "is_encoder_decoder", False):
        reason = ENCODER_DECODER
    raise UserError(
        f"--model.pretrained: model family '{model_type}' is not supported{f': {reason}' if reason else ''}. "
        f"Known families: {', '.join(sorted(FAMILIES))}."
        + ("" if reason else f" {GUIDE} shows how to add one with the same kind of layers.")
    )


def head_dim_of(config: Any) -> int:
    """d: the explicit ``head_dim`` where the config has one, else hidden_size / heads."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def rows_of(config: Any) -> dict[str, int]:
    """Rows of the weights that have units along their rows, by role, in a model or layer with this config."""
    skipped = getattr(config, "skip", None) or ()
    head_dim, channels = head_dim_of(config), 0 if "mlp" in skipped else config.intermediate_size
    heads, kv_heads = (0, 0) if "attention" in skipped else (config.num_attention_heads, config.num_key_value_heads)
    query, key = heads * head_dim, kv_heads * head_dim
    return {"query": query, "key": key, "value": key, "gate": channels, "up": channels}


def layer_structures(model: nn.Module) -> list[LayerStructure]:
    """The decoder layers of a causal LM on any device, meta included. Blocks that an earlier pruning took out
    become ``SkippedBlock``s in the model, which computes the same.

    Raises:
        UserError: unknown family, or a model whose modules, biases or shapes differ from its family's record.
    """
    config: Any = model.config
    layers, family = layers_of(model), family_of(config)
    configs = layer_configs(config)
    if getattr(config, "is_heterogeneous", False):
        fill_skipped(model, family)
    return [_layer_structure(family, configs[index], index, layer) for index, layer in enumerate(layers)]


def layer_configs(config: Any) -> list[Any]:
    """The config of every layer: one for all, or each with widths of its own and ``skip``, the blocks it lacks."""
    own = getattr(config, "is_heterogeneous", False)
    return list(config.per_layer_config) if own else [config] * config.num_hidden_layers


def uniform_config(config: Any) -> Any:
    """A copy of ``config`` with the widths of the dense model, which are the global ones, in every layer."""
    uniform = copy.deepcopy(config)
    uniform.per_layer_config = None
    for name in PER_LAYER_KEYS:
        uniform.__dict__.pop(name, None)
    return uniform


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of ``model`` in order."""
    config: Any = model.config
    layers = model.get_submodule(family_of(config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _layer_structure(family: Family, config: Any, index: int, layer: nn.Module) -> LayerStructure:
    def find(name: str) -> Any:
        try:
            return layer.get_submodule(name)
        except AttributeError:
            raise UserError(
                f"--model.pretrained: layer {index} has no '{name}', which the record of family "
                f"'{family.model_type}' expects."
            ) from None

    view = LayerStructure(
        index=index,
        layer=layer,
        attention=find(family.attention),
        mlp=find(family.mlp),
        attention_norms=tuple(find(name) for name in family.attention_norms if name),
        mlp_norms=tuple(find(name) for name in family.mlp_norms if name),
        mlp_entry=find(family.mlp_norms.before or family.mlp),
        head_dim=head_dim_of(config),
        whole_attention=family.whole_attention,
        **{role: _projection(family, config, role, find(family.path_of(role))) for role in ROLES},
    )
    hidden, rows = config.hidden_size, rows_of(config)
    inputs = {OUTPUT_ROLE[Block.ATTENTION]: rows["query"], OUTPUT_ROLE[Block.MLP]: rows["gate"]}
    for role, linear in view.linears.items():
        shape = (hidden, inputs[role]) if role in inputs else (rows[role], hidden)
        expected = (shape, 0 not in shape and has_bias(config, role))
        actual = (tuple(linear.weight.shape), linear.bias is not None)
        if actual != expected:
            raise UserError(
                f"--model.pretrained: layer {index}, {role} projection has (shape, bias) {actual}; family "
                f"'{family.model_type}' and the config say {expected}."
            )
    return view


def _projection(family: Family, config: Any, role: str, module: nn.Linear) -> Projection:
    roles = family.roles_at(family.path_of(role))
    if len(roles) == 1:
        return Projection(module)
    sizes, place = rows_of(config), roles.index(role)
    start = sum(sizes[earlier] for earlier in roles[:place])
    # The last one has all other rows, so that a shape with too many is noticed.
    return Projection(module, slice(start, None if role == roles[-1] else start + sizes[role]))


def has_bias(config: Any, role: str) -> bool:
    """Whether the projection of ``role`` has a bias in models with ``config``."""
    bias = family_of(config).bias_of(role)
    return bool(getattr(config, bias, False)) if isinstance(bias, str) else bias


def missing_biases(config: Any) -> dict[str, str | None]:
    """Those of the output and the down projection that have no bias → the key that gives them one in a config of the
    family (and others with them: query, key and value, or gate and up); None where there is no such key."""
    keys = {role: family_of(config).bias_of(role) for role in OUTPUT_ROLE.values() if not has_bias(config, role)}
    return {role: key if isinstance(key, str) else None for role, key in keys.items()}


def with_biases(config: Any, keys: Iterable[str]) -> Any:
    """A copy of ``config`` with ``keys`` switched on."""
    changed = copy.deepcopy(config)
    changed.update(dict.fromkeys(keys, True))
    return changed


def count_parameters(model: nn.Module) -> int:
    """Number of unique parameters: embeddings, head, norms and biases included, tied weights once."""
    return sum(parameter.numel() for parameter in model.parameters())
