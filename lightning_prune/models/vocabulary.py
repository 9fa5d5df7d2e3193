"""The one vocabulary of what a decoder layer is made of: blocks, and the roles of their projections."""

from enum import StrEnum


class Block(StrEnum):
    """The block of a unit: ATTENTION for a GQA group, MLP for a channel, LAYER for a whole decoder layer. A MIXER
    (state space, linear attention, convolution, or attention beside one) is one unit, kept as long as its layer."""

    ATTENTION = "attention"
    MLP = "mlp"
    LAYER = "layer"
    EXPERT = "expert"
    EXPERT_CHANNEL = "expert_channel"
    MIXER = "mixer"

    @property
    def place(self) -> int:
        """0 for a block that mixes tokens, 1 for one that sees each by itself. A layer has at most one of each, in this
        order."""
        return 0 if self in (Block.ATTENTION, Block.MIXER) else 1


# A block of experts: its units are whole experts, or the channels of all of them, numbered expert by expert.
EXPERTS = (Block.EXPERT, Block.EXPERT_CHANNEL)
ROLES_OF: dict[Block, tuple[str, ...]] = {
    Block.ATTENTION: ("query", "key", "value", "output"),
    Block.MLP: ("gate", "up", "down"),
}
ROLES = (*ROLES_OF[Block.ATTENTION], *ROLES_OF[Block.MLP])
BLOCK_OF = {role: block for block, roles in ROLES_OF.items() for role in roles}
# The projection of a block that writes to the residual stream: its units are columns, those of the others are rows.
OUTPUT_ROLE = {Block.ATTENTION: "output", Block.MLP: "down"}
