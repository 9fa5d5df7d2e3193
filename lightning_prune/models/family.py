"""What a record says of a model family: where the weights of its layers are, and what its config calls them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_prune.models.vocabulary import BLOCK_OF, EXPERTS, ROLES, ROLES_OF, Block

GUIDE = "docs/add_a_model_family.md"


class Norms(NamedTuple):
    """Norms of a block's input and output, by attribute name below the layer. None: there is none."""

    before: str | None
    after: str | None = None


@dataclass(frozen=True)
class ExpertNames:
    """A block of experts, by attribute name below it, and its sizes, by config key."""

    router: str = "gate"
    # The module with router and experts, where it is beside the family's MLP, which then stays whole; the two add up.
    # Empty for the layer itself, where ``beside`` names the router and norms that belong to them.
    block: str | None = None
    beside: tuple[str, ...] = ()
    top_k: str = ""  # the config key of k, where the router itself has no ``top_k``
    experts: str = "experts"
    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    # How weight files name gate, up and down of one expert, ``<experts>.<number>.<name>.weight`` each; None where they
    # hold the three-dimensional parameters themselves.
    stored: tuple[str, ...] | None = ("gate_proj", "up_proj", "down_proj")
    pair: bool = False  # whether the block also returns the router's weights
    # An MLP beside the experts that is ``shared_count`` (a config key) times as wide as one of them, so that it loses
    # channels with them; one with a width of its own stays whole and needs no entry.
    shared: str | None = None
    shared_count: str = ""
    dense_first: str | None = None  # the config key that says how many layers come before the first one with experts


BEFORE_ATTENTION, BEFORE_MLP = Norms("input_layernorm"), Norms("post_attention_layernorm")
DENSE = (Block.ATTENTION, Block.MLP)
OWN_HEADS = ("head_dim", "num_key_value_heads")


@dataclass(frozen=True, eq=False)
class Family:
    """One model family of ``transformers``. Adding a family is adding one record to ``FAMILIES``.

    Multipliers, soft caps, rotary tables and masks need no entry: embedding, layers, blocks and head are always run by
    the model's own code (``LayeredModel``). Names are attributes below the decoder layer.
    """

    model_type: str
    # Each True, False, or the name of the config key that decides; so is ``side_by_side``.
    attention_bias: bool | str = False
    mlp_bias: bool | str = False
    o_bias: bool | str | None = None  # of the output projection, where it is not that of query, key and value
    # Config keys that hold one entry per layer; those of removed layers are removed.
    per_layer_lists: tuple[str, ...] = ("layer_types",)
    # A family with the same arithmetic that takes head counts which this family's own config refuses; it is used only
    # while no projection has a bias.
    stock_alias: str | None = None
    # Why GQA groups cannot be removed one by one: such a family loses MLP channels and whole layers.
    whole_attention: str | None = None
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    # Roles that name the same projection share its parameter, in the order of ``ROLES`` from its first row on.
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    mlp: str = "mlp"
    gate: str | None = "gate_proj"  # None in an MLP without one
    up: str = "up_proj"
    down: str = "down_proj"
    attention_norms: Norms = BEFORE_ATTENTION  # also of a mixer
    mlp_norms: Norms = BEFORE_MLP
    experts: ExpertNames | None = None
    kinds: str = "layer_types"  # the config key that lists the kind of every layer
    # Kind → what such a layer is made of, in order; other kinds have attention and MLP.
    blocks: Mapping[str, tuple[Block, ...]] = field(default_factory=dict)
    mixer: Mapping[str, bool] = field(default_factory=dict)  # its modules → whether they also return attention weights
    index_lists: tuple[str, ...] = ()  # config keys that hold the numbers of some layers, which are numbered anew
    width: str = "intermediate_size"  # the config key of F
    gated_query: bool = False  # the query's rows are, head by head, query and output gate: twice as many
    per_head: str | None = None  # a parameter of the attention with one number for each query head
    layer_returns: int = 0  # values that a layer returns in a tuple; 0 for the residual stream itself
    # What the MLP multiplies the output of its down projection with, if it does.
    mlp_scale: Callable[[Any], float | None] = lambda config: None
    # Why the record does not treat models with a config; empty where it does.
    refused: Callable[[Any], str] = lambda config: ""
    tiny: Mapping[str, Any] = field(default_factory=dict)  # config entries that make the mixer of a tiny model small
    side_by_side: bool | str = False  # attention (a mixer, which stays whole) and MLP both read the layer's input
    renamed: Mapping[str, str] = field(default_factory=dict)  # parts of names in weight files → in the model
    period: str = ""  # the keys ``<period>_period`` and ``<period>_offset`` say which layers have no mixer
    derived: tuple[str, ...] = ()  # keys that transformers computes and does not write, and that other runtimes read
    # The config says head size and number of KV heads layer by layer, so it is heterogeneous before anything is pruned.
    own_heads: bool = False
    scale: str | None = None  # a stored number that every layer multiplies the residual stream with

    def per_layer(self, config: Any) -> bool:
        """Whether layers differ in more than the family's own config says, so that they need the modeling file."""
        if not self.own_heads or not config.is_heterogeneous:
            return bool(config.is_heterogeneous)
        more = config.per_layer_attributes - set(OWN_HEADS) or hasattr(config, "kept_layer_types")
        return bool(more) or any(own.skip for own in config.per_layer_config)

    def blocks_of(self, config: Any, index: int) -> tuple[Block, ...]:
        """The kinds of blocks in layer ``index`` of a model with ``config``, in the order of execution."""
        kinds = getattr(config, self.kinds, None)
        return self.blocks.get(kinds[index] if kinds else "", DENSE)

    def modules_of(self, block: Block) -> dict[str, bool]:
        """The modules whose outputs a block adds to the residual stream, below the layer → whether they also return
        attention weights."""
        if block is Block.MIXER:
            return dict(self.mixer)
        if block in EXPERTS and self.experts is not None:
            return {self.mlp: False, self.expert_block or self.experts.experts: self.experts.pair}
        return {self.attention: True} if block is Block.ATTENTION else {self.mlp: False}

    @property
    def expert_block(self) -> str:
        """The module with router and experts, below a layer that has them."""
        return self.mlp if self.experts is None or self.experts.block is None else self.experts.block

    def name_in_experts(self, name: str) -> str | None:
        """The name below the block of experts of a parameter ``name`` below the layer; None for other parameters."""
        owner, _, below = name.partition(".")
        if self.experts is None:
            return None
        if self.expert_block:
            return below if owner == self.expert_block else None
        return name if owner in (self.experts.router, self.experts.experts) else None

    def norms_of(self, block: Block) -> Norms:
        """The norms of a block."""
        return self.mlp_norms if block.place else self.attention_norms

    def roles_of(self, block: Block) -> list[str]:
        """The roles of a block's projections, the one that writes to the residual stream last."""
        return [role for role in ROLES_OF.get(block, ()) if getattr(self, role)]

    def path_of(self, role: str) -> str:
        """The projection that holds ``role``, below the layer."""
        return f"{self.attention if BLOCK_OF[role] is Block.ATTENTION else self.mlp}.{getattr(self, role)}"

    def bias_of(self, role: str) -> bool | str:
        """The bias entry of ``role``."""
        if BLOCK_OF[role] is Block.MLP:
            return self.mlp_bias
        return self.attention_bias if role != "output" or self.o_bias is None else self.o_bias

    @staticmethod
    def says(config: Any, entry: bool | str) -> bool:
        """The value of an entry that may name the config key that decides."""
        return bool(getattr(config, entry, False)) if isinstance(entry, str) else entry

    def roles_at(self, path: str) -> list[str]:
        """The roles that the projection ``path`` below the layer holds, in the order of its rows; none for others."""
        return [role for role in ROLES if self.path_of(role) == path]
