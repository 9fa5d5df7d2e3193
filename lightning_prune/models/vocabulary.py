"""The one vocabulary of what a decoder layer is made of: blocks, and the roles of their projections."""

from enum import StrEnum


class Block(StrEnum):
    """What a prunable unit belongs to: a GQA group to ATTENTION, a channel to MLP, a whole decoder layer to LAYER."""

    ATTENTION = "attention"
    MLP = "mlp"
    LAYER = "layer"


ROLES_OF: dict[Block, tuple[str, ...]] = {
    Block.ATTENTION: ("query", "key", "value", "output"),
    Block.MLP: ("gate", "up", "down"),
}
ROLES = (*ROLES_OF[Block.ATTENTION], *ROLES_OF[Block.MLP])
BLOCK_OF = {role: block for block, roles in ROLES_OF.items() for role in roles}
# The projection of a block that writes to the residual stream: its units are columns, those of the others are rows.
OUTPUT_ROLE = {Block.ATTENTION: "output", Block.MLP: "down"}
# Projections that read the same activation → the first of them, where it is observed.
INPUT_OF = {role: role for role in ROLES} | {"key": "query", "value": "query", "up": "gate"}
