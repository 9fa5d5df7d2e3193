"""The prunable weights of a decoder: its family's record (``models.records``) as one ``LayerStructure`` per layer."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_prune.models.expert_layers import has_experts, say_experts, say_period
from lightning_prune.models.experts import Experts
from lightning_prune.models.family import GUIDE, OWN_HEADS, Family
from lightning_prune.models.projection import Projection
from lightning_prune.models.records import FAMILIES
from lightning_prune.models.refusals import ENCODER_DECODER, REFUSED, SEVERAL_MODELS
from lightning_prune.models.skipped import fill_skipped
from lightning_prune.models.vocabulary import BLOCK_OF, EXPERTS, OUTPUT_ROLE, Block
from lightning_prune.support.errors import UserError

# Of the config of a checkpoint with widths per layer, beside these widths.
PER_LAYER_KEYS = (
    *("auto_map", "how_to_load", "block_norms", "block_modules", "kept_layer_types"),
    "allow_global_per_layer_attribute_access",
)


@dataclass(frozen=True)
class BlockStructure:
    """One block of a layer, which adds the outputs of its ``modules`` to the residual stream."""

    modules: dict[nn.Module, bool]  # → whether their forward also returns attention weights
    norms: tuple[nn.Module, ...]  # of its input and output, and a router that is in none of the modules
    entry: nn.Module  # the first one after the residual stream, which has the block's input as its own
    exit: nn.Module | None  # the norm of its output
    linears: dict[str, Projection]  # by role, the one that writes to the residual stream last; none of a mixer
    units: int  # GQA groups, channels, 1 for a mixer, experts or the channels of all of them
    experts: Experts | None = None
    per_head: str | None = None  # a parameter of its module with a number for each query head

    @property
    def cost(self) -> int:
        """Parameters of the whole block, norms included."""
        return sum(map(count_parameters, (*self.modules, *self.norms)))


@dataclass(frozen=True)
class LayerStructure:
    """One decoder layer. K KV heads, r query heads per KV head, d = head_dim, F channels, D hidden size.

    Weights: query ``[K·r·d, D]``, key and value ``[K·d, D]``, output ``[D, K·r·d]``, gate and up ``[F, D]``,
    down ``[D, F]``. KV head j serves the contiguous query heads j·r … j·r + r − 1.
    """

    index: int
    layer: nn.Module
    parts: dict[Block, BlockStructure]  # in the order of execution
    head_dim: int
    whole_attention: str | None = None  # why groups cannot be removed one by one
    side_by_side: bool = False  # both blocks read the layer's input
    scale: str | None = None  # the name of a number that the layer multiplies its output with

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the layer, in the order of execution."""
        return tuple(self.parts)

    @property
    def stages(self) -> tuple[Block, ...]:
        """The blocks that change the residual stream one after another; of two side by side the last, which adds both
        (``LayeredModel.beside``)."""
        return self.blocks[-1:] if self.side_by_side else self.blocks

    @property
    def prunable(self) -> tuple[Block, ...]:
        """The blocks of projections, whose units are scored: all but a mixer and experts."""
        return tuple(block for block in self.parts if block not in (Block.MIXER, *EXPERTS))

    @property
    def scored(self) -> tuple[Block, ...]:
        """The blocks whose units are scored: all but a mixer."""
        return tuple(block for block in self.parts if block is not Block.MIXER)

    @property
    def experts(self) -> Experts | None:
        """The experts of the layer, if it has any."""
        return next((part.experts for part in self.parts.values() if part.experts is not None), None)

    def with_experts_as(self, unit: Block) -> "LayerStructure":
        """The same layer, its experts' units being ``unit``: EXPERT or EXPERT_CHANNEL."""
        parts = {}
        for block, part in self.parts.items():
            if (experts := part.experts) is None:
                parts[block] = part
            else:
                units = experts.count if unit is Block.EXPERT else experts.total * experts.width
                parts[unit] = replace(part, units=units)
        return replace(self, parts=parts)

    def units(self, block: Block) -> int:
        """Number of units: K GQA groups, F MLP channels, 1 for a mixer; 0 where the layer lacks the block."""
        return self.parts[block].units if block in self.parts else 0

    @property
    def all_units(self) -> dict[Block, list[int]]:
        """The indices of the units of every block, all of which a plan of an unpruned layer keeps."""
        return {block: list(range(part.units)) for block, part in self.parts.items()}

    def projection(self, block: Block) -> Projection:
        """The projection of a block that writes to the residual stream: o_proj or down_proj."""
        return self.parts[block].linears[OUTPUT_ROLE[block]]

    def unit_cost(self, block: Block) -> int:
        """Parameters that are removed with one unit: its rows with their biases, and its columns; 0 without units."""
        if block is Block.MIXER or block not in self.parts:
            return self.block_cost(block)
        if (experts := self.parts[block].experts) is not None:
            return experts.expert_cost if block is Block.EXPERT else experts.channel_cost
        part = self.parts[block]
        *rows, columns = part.linears.values()
        tensors = [columns.weight, *(linear.weight for linear in rows), *(linear.bias for linear in rows)]
        tensors += [getattr(module, part.per_head) for module in part.modules if part.per_head]
        return sum(tensor.numel() for tensor in tensors if tensor is not None) // max(1, self.units(block))

    def block_cost(self, block: Block) -> int:
        """Parameters that are removed with the whole block: all units, the output bias and the norms."""
        return self.parts[block].cost if block in self.parts else 0

    @property
    def cost(self) -> int:
        """Number of parameters of the whole layer, all blocks with their norms."""
        scale = getattr(self.layer, self.scale).numel() if self.scale else 0
        return scale + sum(part.cost for part in self.parts.values())

    @property
    def linears(self) -> dict[str, Projection]:
        """The projections by role, of those there are: query, key, value, output, gate, up, down."""
        return {role: linear for part in self.parts.values() for role, linear in part.linears.items()}

    @property
    def num_weights(self) -> int:
        """Numbers in all projections, and in mixers and blocks of experts."""
        linears = sum(linear.weight.numel() for linear in self.linears.values())
        return linears + sum(self.block_cost(block) for block in self.parts if block not in self.prunable)

    def read_with(self, role: str) -> str:
        """The first of the roles that read the same activation as ``role``, where it is observed."""
        block = BLOCK_OF[role]
        return role if role == OUTPUT_ROLE[block] else next(iter(self.parts[block].linears))


def family_of(config: Any) -> Family:
    """The record for ``config.model_type``. Raises UserError, with the known families, where there is none."""
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(str(model_type))
    if family is not None and not (reason := family.refused(config)):
        return family
    if family is None:
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
    """Head size d: the explicit ``head_dim`` where the config has one, else hidden_size / heads."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def kv_heads_of(config: Any) -> int:
    """Number of KV heads K: that of the query heads where the config does not give one."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def shapes_of(config: Any) -> dict[str, tuple[int, int]]:
    """Shape ``[rows, columns]`` of every role's weight in a model or layer with this config."""
    family, hidden, skipped = family_of(config), config.hidden_size, getattr(config, "skip", None) or ()
    head_dim = 0 if "attention" in skipped else head_dim_of(config)
    channels = 0 if "mlp" in skipped else getattr(config, family.width)
    queries, keys = config.num_attention_heads * head_dim, kv_heads_of(config) * head_dim
    return {
        "query": (queries * (1 + family.gated_query), hidden),
        **dict.fromkeys(("key", "value"), (keys, hidden)),
        "output": (hidden, queries),
        **dict.fromkeys(("gate", "up"), (channels, hidden)),
        "down": (hidden, channels),
    }


def layer_structures(model: nn.Module) -> list[LayerStructure]:
    """The decoder layers of a causal LM on any device, meta included. Blocks that an earlier pruning took out
    become ``SkippedBlock``s in the model, which computes the same. Raises UserError for an unknown family, and where
    modules, biases or shapes differ from the family's record."""
    config: Any = model.config
    layers, family = layers_of(model), family_of(config)
    if getattr(config, "is_heterogeneous", False):
        fill_skipped(model, family)
    pairs = zip(layer_configs(config), layers, strict=True)
    return [_layer_structure(family, own, index, layer) for index, (own, layer) in enumerate(pairs)]


def layer_configs(config: Any) -> list[Any]:
    """The config of every layer: one for all, or each with widths of its own and ``skip``, the blocks it lacks."""
    own = getattr(config, "is_heterogeneous", False)
    return list(config.per_layer_config) if own else [config] * config.num_hidden_layers


def uniform_config(config: Any) -> Any:
    """A copy of ``config`` with the global widths, those of the dense model, in every layer; of a family whose heads
    differ by layer, with as many KV heads per query head as the layer has."""
    uniform, layers = copy.deepcopy(config), layer_configs(config)
    uniform.per_layer_config = None
    if family_of(config).own_heads:
        heads = uniform.num_attention_heads
        uniform.per_layer_config = {
            index: {
                "head_dim": own.head_dim,
                "num_key_value_heads": own.num_key_value_heads * heads // own.num_attention_heads,
            }
            for index, own in enumerate(layers)
        }
    copied = ("logit_scale",) if getattr(config, "logits_scaling", None) else ()  # of others it is a key of their own
    for name in (*PER_LAYER_KEYS, *copied):
        uniform.__dict__.pop(name, None)
    return uniform


def choose_layers(target: Any, config: Any, layers: Sequence[int]) -> None:
    """Give the config ``target`` the entries that ``config`` has for ``layers``, in this order, and their number.
    Raises UserError where the family's config cannot say which layers have experts, or are of a kind."""
    family, target.num_hidden_layers = family_of(config), len(layers)
    if family.experts is not None:
        say_experts(target, family.experts, [has_experts(config, family.experts, layer) for layer in layers])
    if family.own_heads:
        of = config.per_layer_config
        own = [{name: getattr(of[layer], name) for name in OWN_HEADS} for layer in layers]
        target.per_layer_config = dict(enumerate(own))
    if family.period:
        kinds = getattr(config, family.kinds)
        say_period(target, family.period, [kinds[layer] not in family.blocks for layer in layers])
    for name in family.per_layer_lists:
        if (entries := getattr(config, name, None)) is not None:
            setattr(target, name, [entries[layer] for layer in layers])
    for name in family.index_lists:
        if (listed := getattr(config, name, None)) is not None:
            setattr(target, name, [place for place, layer in enumerate(layers) if layer in listed])


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of ``model`` in order."""
    config: Any = model.config
    return model.get_submodule(family_of(config).layers)  # type: ignore[return-value]


def _layer_structure(family: Family, config: Any, index: int, layer: nn.Module) -> LayerStructure:
    def find(name: str) -> Any:
        try:
            return layer.get_submodule(name)
        except AttributeError:
            raise UserError(
                f"--model.pretrained: layer {index} has no '{name}', which the record of family "
                f"'{family.model_type}' expects."
            ) from None

    def there(path: str) -> bool:
        """Whether the layer has the module ``path``: some attention of Gemma 4 takes its values from the keys."""
        owner, _, name = path.rpartition(".")
        return getattr(find(owner), name, path) is not None

    def block_structure(block: Block) -> BlockStructure:
        modules, norms = family.modules_of(block), [name for name in family.norms_of(block) if name]
        paths = {role: family.path_of(role) for role in family.roles_of(block)}
        linears = {role: _projection(family, config, role, find(path)) for role, path in paths.items() if there(path)}
        experts = None
        if family.experts and block in EXPERTS:
            experts = Experts(find(family.expert_block), family.experts)
            norms += family.experts.beside
        return BlockStructure(
            modules={find(name): pair for name, pair in modules.items()},
            norms=tuple(map(find, norms)),
            entry=find(family.norms_of(block).before or next(iter(modules))),
            exit=find(after) if (after := family.norms_of(block).after) else None,
            linears=linears,
            units=experts.total * experts.width if experts else _units(block, linears, head_dim_of(config)),
            experts=experts,
            per_head=family.per_head if block is Block.ATTENTION else None,
        )

    parts = {}
    for block in family.blocks_of(config, index):
        module = getattr(layer, family.expert_block, None) if family.expert_block else layer
        if block is Block.MLP and family.experts and hasattr(module, family.experts.experts):
            block = Block.EXPERT_CHANNEL  # not in every layer
        parts[block] = block_structure(block)
    beside = family.says(config, family.side_by_side)
    view = LayerStructure(index, layer, parts, head_dim_of(config), family.whole_attention, beside, family.scale)
    shapes = shapes_of(config)
    for role, linear in view.linears.items():
        expected = (shapes[role], 0 not in shapes[role] and has_bias(config, role))
        actual = (tuple(linear.weight.shape), linear.bias is not None)
        if actual != expected:
            raise UserError(
                f"--model.pretrained: layer {index}, {role} projection has (shape, bias) {actual}; family "
                f"'{family.model_type}' and the config say {expected}. Give the config.json that belongs to the model."
            )
    return view


def _units(block: Block, linears: dict[str, Projection], head_dim: int) -> int:
    if block is Block.MIXER:
        return 1
    return len(linears["key"].weight) // head_dim if block is Block.ATTENTION else len(linears["up"].weight)


def _projection(family: Family, config: Any, role: str, module: nn.Linear) -> Projection:
    roles = family.roles_at(family.path_of(role))
    if len(roles) == 1:
        return Projection(module)
    shapes, place = shapes_of(config), roles.index(role)
    start = sum(shapes[earlier][0] for earlier in roles[:place])
    # The last one has all other rows, so that a shape with too many is noticed.
    return Projection(module, slice(start, None if role == roles[-1] else start + shapes[role][0]))


def has_bias(config: Any, role: str) -> bool:
    """Whether the projection of ``role`` has a bias in models with ``config``."""
    family = family_of(config)
    return family.says(config, family.bias_of(role))


def missing_biases(config: Any) -> dict[str, str | None]:
    """Output and down projections without a bias → the config key of the family that gives them one (and others with
    them: query, key and value, or gate and up); None where the family does not have such a key."""
    keys = {role: family_of(config).bias_of(role) for role in OUTPUT_ROLE.values() if not has_bias(config, role)}
    return {role: key if isinstance(key, str) else None for role, key in keys.items()}


def with_biases(config: Any, keys: Iterable[str]) -> Any:
    """A copy of ``config`` with ``keys`` switched on."""
    changed = copy.deepcopy(config)
    changed.update(dict.fromkeys(keys, True))
    return changed


def count_parameters(model: nn.Module) -> int:
    """Number of unique parameters: embeddings, head, norms and biases included, tied weights once; buffers that files
    hold are counted too."""
    unique = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    return sum(unique.values())
