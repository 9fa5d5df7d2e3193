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
    """A block of experts, by attribute name below it, and its sizes, by config key.

    ``stored``: how weight files name gate, up and down of one expert, ``<experts>.<number>.<name>.weight`` each; None
    where they hold the three-dimensional parameters themselves. ``renamed``: parts of names in weight files → in the
    model. ``pair``: whether the block also returns the router's weights.

    ``block``: the module with router and experts, where it is beside the family's MLP, which then stays whole; the two
    add up. Empty for the layer itself, where ``beside`` names the router and norms that belong to them. ``top_k``: the
    config key of k, where the router itself has no ``top_k``. ``shared``: an MLP beside the experts that is
    ``shared_count`` (a config key) times as wide as one of them, so that it loses channels with them; one with a width
    of its own stays whole and needs no entry. ``dense_first``: the config key that says how many layers come before the
    first one with experts.
    """

    router: str = "gate"
    block: str | None = None
    beside: tuple[str, ...] = ()
    top_k: str = ""
    experts: str = "experts"
    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    stored: tuple[str, ...] | None = ("gate_proj", "up_proj", "down_proj")
    renamed: tuple[tuple[str, str], ...] = ()
    pair: bool = False
    shared: str | None = None
    shared_count: str = ""
    dense_first: str | None = None


BEFORE_ATTENTION, BEFORE_MLP = Norms("input_layernorm"), Norms("post_attention_layernorm")
DENSE = (Block.ATTENTION, Block.MLP)
OWN_HEADS = ("head_dim", "num_key_value_heads")


@dataclass(frozen=True, eq=False)
class Family:
    """One model family of ``transformers``. Adding a family is adding one record to ``FAMILIES``.

    Multipliers, soft caps, rotary tables and masks need no entry: embedding, layers, blocks and head are always run by
    the model's own code (``LayeredModel``).

    ``kinds`` is the config key that lists the kind of every layer, and ``blocks`` what a layer of a kind is made of, in
    order; other kinds have attention and MLP. ``mixer``: the modules of a mixer → whether
    they also return attention weights; its norms are those of attention.

    Names are attributes below the decoder layer; ``gate`` is None in an MLP without one. Roles that name the same
    projection share its parameter, in the order of ``ROLES`` from its first row on. A bias entry is True, False, or the
    name of the config key that decides.
    ``per_layer_lists`` are config keys holding one entry per layer; entries of removed layers are removed.
    ``index_lists`` hold the numbers of some layers, and are numbered anew. ``width`` is the config key of F.
    ``gated_query``: the query's rows are, head by head, query and output gate, so there are twice as many.
    ``per_head``: a parameter of the attention with one number for each query head.
    ``layer_returns``: how many values a layer returns in a tuple; 0 for the residual stream itself. ``mlp_scale``:
    what the MLP multiplies the output of its down projection with, if it does. ``tiny`` are config entries that make
    the mixer of a tiny model small. ``refused`` says why the record does not treat models with a config; empty where
    it does.
    ``own_heads``: the family's config says head size and number of KV heads layer by layer, so that it is heterogeneous
    before anything is pruned. ``scale``: a stored number that every layer multiplies the residual stream with.
    ``side_by_side``: whether attention (a mixer, which stays whole) and MLP both read the layer's input; True, False,
    or the config key that decides. ``renamed``: how names in weight files begin → in the model.
    ``period``: the keys ``<period>_period`` and ``<period>_offset`` say which layers have no mixer.
    ``derived``: keys that transformers computes from others and does not write, and that other runtimes read.
    ``stock_alias`` names a family with the same arithmetic that takes head counts which this family's own config
    refuses; it is used only while no projection has a bias. ``whole_attention`` says why GQA groups cannot be removed
    one by one, where they cannot: such a family loses MLP channels and whole layers.
    """

    model_type: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    per_layer_lists: tuple[str, ...] = ()
    stock_alias: str | None = None
    whole_attention: str | None = None
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    mlp: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    attention_norms: Norms = BEFORE_ATTENTION
    mlp_norms: Norms = BEFORE_MLP
    experts: ExpertNames | None = None
    kinds: str = "layer_types"
    blocks: Mapping[str, tuple[Block, ...]] = field(default_factory=dict)
    mixer: Mapping[str, bool] = field(default_factory=dict)
    index_lists: tuple[str, ...] = ()
    width: str = "intermediate_size"
    gated_query: bool = False
    per_head: str | None = None
    layer_returns: int = 0
    mlp_scale: Callable[[Any], float | None] = lambda config: None
    refused: Callable[[Any], str] = lambda config: ""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    side_by_side: bool | str = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    period: str = ""
    derived: tuple[str, ...] = ()
    own_heads: bool = False
    scale: str | None = None

    def per_layer(self, config: Any) -> bool:
        """Whether layers differ in more than the family's own config says, so that they need the modeling file."""
        if not self.own_heads or not config.is_heterogeneous:
            return bool(config.is_heterogeneous)
        more = config.per_layer_attributes - set(OWN_HEADS) or hasattr(config, "kept_layer_types")
        return bool(more) or any(own.skip for own in config.per_layer_config)

    def blocks_of(self, config: Any, index: int) -> tuple[Block, ...]:
        """What layer ``index`` of a model with ``config`` is made of, in the order of execution."""
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
        return self.o_bias if role == "output" else self.qkv_bias

    @staticmethod
    def says(config: Any, entry: bool | str) -> bool:
        """The value of an entry that may name the config key that decides."""
        return bool(getattr(config, entry, False)) if isinstance(entry, str) else entry

    def roles_at(self, path: str) -> list[str]:
        """The roles that the projection ``path`` below the layer holds, in the order of its rows; none for others."""
        return [role for role in ROLES if self.path_of(role) == path]
