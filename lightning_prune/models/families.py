"""Where a decoder keeps its prunable weights: one record per family, read into one view per layer."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_prune.errors import UserError


@dataclass(frozen=True)
class Family:
    """One model family of ``transformers``. Adding a family is adding one record to ``FAMILIES``.

    Paths are attribute names below the decoder layer. A bias entry is True, False, or the name of the config
    key that decides. ``per_layer_lists`` are config keys holding one entry per layer; they are cut along
    when layers leave. ``stock_alias`` names a family with the same arithmetic whose config accepts head
    counts that do not divide ``hidden_size``, which this family's own config refuses; it may only stand in
    while no projection has a bias.
    """

    model_type: str
    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str
    per_layer_lists: tuple[str, ...] = ()
    stock_alias: str | None = None
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"

    def role_of(self, name: str) -> str | None:
        """The role of a projection's weight from its name below the layer, None for every other parameter."""
        for block, roles in ((self.attention, ("query", "key", "value", "output")), (self.mlp, ("gate", "up", "down"))):
            for role in roles:
                if name == f"{block}.{getattr(self, role)}.weight":
                    return role
        return None


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "attention_bias", "attention_bias", "mlp_bias", stock_alias="mistral"),
        Family("mistral", False, False, False),
        Family("qwen2", True, False, False, per_layer_lists=("layer_types",)),
        Family("qwen3", "attention_bias", "attention_bias", False, per_layer_lists=("layer_types",)),
    )
}


@dataclass(frozen=True)
class LayerAnatomy:
    """One decoder layer. K KV heads, r query heads per KV head, d = head_dim, F channels, D hidden size.

    Weights: query ``[K·r·d, D]``, key and value ``[K·d, D]``, output ``[D, K·r·d]``, gate and up ``[F, D]``,
    down ``[D, F]``. KV head j serves the contiguous query heads j·r … j·r + r − 1.
    """

    index: int
    layer: nn.Module
    attention: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    mlp: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    attention_norm: nn.Module
    mlp_norm: nn.Module
    head_dim: int

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.key.out_features // self.head_dim

    @property
    def queries_per_kv_head(self) -> int:
        """r, 1 for multi-head attention."""
        return self.query.out_features // self.key.out_features

    @property
    def num_channels(self) -> int:
        """F."""
        return self.gate.out_features

    @property
    def attention_unit_cost(self) -> int:
        """Parameters that leave with one GQA group: rows of q, k, v with their biases, columns of o."""
        rows = _parameters(self.query) + _parameters(self.key) + _parameters(self.value)
        return (rows + self.output.weight.numel()) // self.num_kv_heads

    @property
    def mlp_unit_cost(self) -> int:
        """Parameters that leave with one MLP channel: rows of gate and up with their biases, a column of down."""
        rows = _parameters(self.gate) + _parameters(self.up)
        return (rows + self.down.weight.numel()) // self.num_channels

    @property
    def attention_block_cost(self) -> int:
        """Parameters that leave when attention is skipped: all groups, the output bias and the norms."""
        return count_parameters(self.attention) + count_parameters(self.attention_norm)

    @property
    def mlp_block_cost(self) -> int:
        """Parameters that leave when the MLP is skipped: all channels, the down bias and the norm."""
        return count_parameters(self.mlp) + count_parameters(self.mlp_norm)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The seven projections by role: query, key, value, output, gate, up, down."""
        return {role: getattr(self, role) for role in ("query", "key", "value", "output", "gate", "up", "down")}


def _parameters(linear: nn.Linear) -> int:
    return linear.weight.numel() + (linear.bias.numel() if linear.bias is not None else 0)


def family_of(config: Any) -> Family:
    """The record for ``config.model_type``.

    Raises:
        UserError: no record; the message lists the known families.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise UserError(
            f"--model.pretrained: model family '{model_type}' is not supported. "
            f"Known families: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def head_dim_of(config: Any) -> int:
    """d: the explicit ``head_dim`` where the config has one, else hidden_size / heads."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def anatomy(model: nn.Module) -> list[LayerAnatomy]:
    """Resolve the family's paths on ``model`` (a causal LM, on any device, the meta device included).

    Raises:
        UserError: unknown family, a model that is already pruned per layer, or one whose modules, biases
            or shapes differ from its family's record.
    """
    config: Any = model.config
    family = family_of(config)
    if getattr(config, "is_heterogeneous", False):
        raise UserError(
            "--model.pretrained: this checkpoint is already pruned with a different width per layer. "
            "Prune the dense model instead."
        )
    head_dim = head_dim_of(config)
    return [_layer_anatomy(family, config, head_dim, index, layer) for index, layer in enumerate(layers_of(model))]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of ``model`` in order."""
    config: Any = model.config
    layers = model.get_submodule(family_of(config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def final_norm_of(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the head."""
    config: Any = model.config
    return model.get_submodule(family_of(config).final_norm)


def _layer_anatomy(family: Family, config: Any, head_dim: int, index: int, layer: nn.Module) -> LayerAnatomy:
    def find(*names: str) -> Any:
        try:
            return layer.get_submodule(".".join(names))
        except AttributeError:
            raise UserError(
                f"--model.pretrained: layer {index} has no '{'.'.join(names)}', which the record of family "
                f"'{family.model_type}' expects."
            ) from None

    found = LayerAnatomy(
        index=index,
        layer=layer,
        attention=find(family.attention),
        query=find(family.attention, family.query),
        key=find(family.attention, family.key),
        value=find(family.attention, family.value),
        output=find(family.attention, family.output),
        mlp=find(family.mlp),
        gate=find(family.mlp, family.gate),
        up=find(family.mlp, family.up),
        down=find(family.mlp, family.down),
        attention_norm=find(family.attention_norm),
        mlp_norm=find(family.mlp_norm),
        head_dim=head_dim,
    )
    _check_shapes(found, family, config)
    return found


def _check_shapes(found: LayerAnatomy, family: Family, config: Any) -> None:
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    query, key, channels = heads * found.head_dim, kv_heads * found.head_dim, config.intermediate_size
    expected: dict[str, tuple[int, int, bool | str]] = {
        "query": (query, hidden, family.qkv_bias),
        "key": (key, hidden, family.qkv_bias),
        "value": (key, hidden, family.qkv_bias),
        "output": (hidden, query, family.o_bias),
        "gate": (channels, hidden, family.mlp_bias),
        "up": (channels, hidden, family.mlp_bias),
        "down": (hidden, channels, family.mlp_bias),
    }
    for role, (rows, columns, bias) in expected.items():
        linear = found.linears[role]
        has_bias = _switch(config, bias)
        actual = (tuple(linear.weight.shape), linear.bias is not None)
        if actual != ((rows, columns), has_bias):
            raise UserError(
                f"--model.pretrained: layer {found.index}, {role} projection has (shape, bias) {actual}; family "
                f"'{family.model_type}' and the config say {((rows, columns), has_bias)}."
            )


def projection_biases(config: Any) -> bool:
    """Whether any of the seven projections of ``config``'s family carries a bias."""
    family = family_of(config)
    return any(_switch(config, bias) for bias in (family.qkv_bias, family.o_bias, family.mlp_bias))


def _switch(config: Any, bias: bool | str) -> bool:
    return bool(getattr(config, bias, False)) if isinstance(bias, str) else bias


def count_parameters(model: nn.Module) -> int:
    """Number of unique parameters: embeddings, head, norms and biases included, tied weights once."""
    return sum(parameter.numel() for parameter in model.parameters())
