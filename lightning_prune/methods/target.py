"""Memory and operations of a model in use, from its shapes alone, and a target size instead of a ratio."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.checkpoint.expert_plans import active_parameters
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.checkpoint.scores import Integers, Scores
from lightning_prune.checkpoint.whole import bytes_beside
from lightning_prune.methods.selection import TooLittle
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import LayerStructure, kv_heads_of
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from lightning_prune.support.memory import parse_bytes

SIZES = ("target_parameters", "target_active_parameters", "target_memory")  # options, in place of pruning_ratio
LESS = "freeze and protect less"  # what may help where a target is out of reach
CONTEXTS = (2_048, 32_768)  # tokens; a conversation, and a long document
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str, option: str) -> int:
    """``4.5B`` or ``800M`` parameters as a number; UserError of anything else, and of nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMBT]?)", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise UserError(f"{option}: found '{text}'; give a size such as 4.5B or 800M.")
    return int(Fraction(match[1]) * UNITS[match[2]])


def check_share(ratio: float, option: str) -> None:
    """Raise UserError unless ``ratio`` is a share of all parameters, 0 and 1 excluded."""
    if not 0 < ratio < 1:
        raise UserError(
            f"{option}: found {ratio:g}; it is a share of all parameters and must lie between 0 and 1, both excluded "
            "(0.2 removes a fifth)."
        )


def kind_of(text: str) -> str:
    """Kind of a size such as ``4.5B`` or ``6GiB``, as options name it: ``parameters`` or ``memory``."""
    return "memory" if re.search(r"[KMGT]I?B *$", text.upper()) else "parameters"


def parse_size(text: str, kind: str, option: str) -> int:
    """Bytes of ``memory``, or a number of parameters, from text such as ``6GiB`` or ``4.5B``."""
    return parse_bytes(text, option) if kind == "memory" else parse_count(text, option)


@dataclass(frozen=True)
class Target:
    """The largest size of a pruned model: ``limit`` in ``parameters``, ``active_parameters`` (of one token) or
    ``memory``, the bytes of weights and of the KV cache of ``batch`` sequences of ``context`` tokens. ``beside``: bytes
    of what is written with the text model, which memory counts."""

    kind: str
    limit: int
    context: int
    batch: int
    beside: int = 0

    @classmethod
    def of(cls, sizes: dict[str, str | int | None], context: int, batch: int) -> "Target | None":
        """Make a target from the options ``target_<kind>``, by kind; None without a target. Raises UserError for
        several targets and for a size that is not one."""
        given = {kind: str(size) for kind, size in sizes.items() if size is not None}
        if not given:
            return None
        if len(given) > 1:
            raise UserError(f"{' and '.join(f'--model.target_{kind}' for kind in given)}: give one of them.")
        for name, value in (("context", context), ("batch", batch)):
            if value < 1:
                raise UserError(f"--model.{name}: found {value}; it must be 1 or more.")
        ((kind, text),) = given.items()
        return cls(kind, parse_size(text, kind, f"--model.target_{kind}"), context, batch)

    @property
    def option(self) -> str:
        """The target's option on the command line."""
        return f"--model.target_{self.kind} {self.limit:,}"

    def within(self, positions: int) -> "Target":
        """The target of a model with so many positions: its KV cache holds no more tokens. Warns if those are fewer."""
        if self.context <= positions:
            return self
        if self.kind == "memory":
            rank_zero_warn(
                f"--model.context {self.context:,}: the model has {positions:,} positions, so its KV cache is counted "
                "with as many tokens."
            )
        return replace(self, context=positions)

    def around(self, dense: Checkpoint, keep: str) -> "Target":
        """The target of a run that writes what ``keep`` says of ``dense``. UserError: what is not pruned exceeds it."""
        beside = bytes_beside(dense) if keep == "whole" else 0
        if self.kind == "memory" and beside >= self.limit:
            raise UserError(
                f"{self.option}: the parts of '{dense.pretrained}' beside the text model, which are not pruned, take "
                f"{beside:,} bytes. Raise the target, or leave them out with --model.keep text."
            )
        return replace(self, beside=beside)

    def size(
        self, parameters: int, layers: Sequence[LayerStructure], kept: Sequence[LayerPlan], config: Any, itemsize: int
    ) -> int:
        """Size of a model in the target's unit: parameters or bytes.

        Args:
            parameters: all that are left, tied ones once.
            layers, config: of the dense model; ``kept``: of every layer.
            itemsize: bytes of a number.
        """
        if self.kind == "memory":
            return self.beside + memory_bytes(parameters, layers, kept, config, self.context, self.batch, itemsize)
        return parameters if self.kind == "parameters" else active_parameters(layers, parameters, kept)

    def weighed(self, scores: Scores, config: Any, layers: Sequence[LayerStructure]) -> Scores:
        """Scores per number that a unit takes in memory, a GQA group's part of the KV cache included; per parameter, as
        they are, where parameters are the target."""
        if self.kind != "memory":
            return scores
        cache = np.array(cache_numbers(config, layers, self.context, self.batch))
        price: Integers = scores.cost + np.where(scores.of_kind(Block.ATTENTION), cache[scores.layer], 0)
        base = scores.importance / price
        return replace(scores, base=base, score=base)

    def remedy(self, layers: Sequence[LayerStructure]) -> str:
        """What to do, beside raising the target, where it cannot be reached."""
        if self.kind == "active_parameters" and any(Block.EXPERT in view.parts for view in layers):
            return (
                "prune channels inside experts, with --model.units expert_channel of a method such as wanda: a token "
                "uses as many experts as before where whole ones are removed, which hardly lowers this size"
            )
        return LESS

    def reach(self, size_at: Callable[[Fraction], int], total: int, remedy: str = LESS) -> Fraction:
        """The smallest share of ``total`` parameters to remove with which ``size_at`` is not above the target;
        ``remedy`` is what the message says to do, beside raising the target, where none is.

        ``size_at`` falls with the share, and raises UserError where it cannot be removed. Raises UserError: the target
        is not below the dense size, or no share reaches it.
        """

        def fits(count: int) -> bool | None:
            """Whether removing ``count`` parameters meets the target; None where so many cannot be removed."""
            try:
                return size_at(Fraction(count, total)) <= self.limit
            except TooLittle:
                return False
            except UserError:
                return None

        if size_at(Fraction(0)) <= self.limit:
            raise UserError(
                f"{self.option}: the dense model has {size_at(Fraction(0)):,} and is not above that. Nothing to prune."
            )
        low, high = 0, total  # what is removed: too little, enough or more than can be
        while high - low > 1:
            middle = (low + high) // 2
            if fits(middle) is False:
                low = middle
            else:
                high = middle
        if not fits(high):
            smallest = f"{size_at(Fraction(low, total)):,}{' bytes' * (self.kind == 'memory')}"
            raise UserError(
                f"{self.option} cannot be reached with these options: the smallest size is {smallest}. Raise the "
                f"target, or {remedy}."
            )
        return Fraction(high, total)


def memory_bytes(
    parameters: int,
    layers: Sequence[LayerStructure],
    kept: Sequence[LayerPlan],
    config: Any,
    context: int,
    batch: int,
    itemsize: int,
) -> int:
    """Bytes of weights and of the KV cache of ``batch`` sequences of ``context`` tokens; arguments as for ``size``."""
    # A mixer is kept whole, so what all of its heads keep counts once.
    heads = [len(layer.kept.get(Block.ATTENTION, [])) or len(layer.kept.get(Block.MIXER, [])) for layer in kept]
    cache = zip(heads, cache_numbers(config, layers, context, batch), strict=True)
    return itemsize * (parameters + sum(count * each for count, each in cache))


def cache_numbers(config: Any, layers: Sequence[LayerStructure], context: int, batch: int) -> list[int]:
    """Numbers in the cache per layer, for ``batch`` sequences of ``context`` tokens: those of one KV head, and for
    attention inside a mixer those of all its heads. These are keys and values, or their inputs, as far back as the
    layer looks; 0 without attention. The states of other mixers do not grow and are not counted."""
    window: int = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    sizes = []
    for view in layers:
        sliding = window > 0 and (kinds is None or kinds[view.index] == "sliding_attention")
        tokens = min(context, window) if sliding and getattr(config, "use_sliding_window", True) else context
        each = 2 * view.head_dim * (view.units(Block.ATTENTION) > 0)
        if Block.MIXER in view.parts and any(view.parts[Block.MIXER].modules.values()):
            latent = getattr(config, "kv_lora_rank", None)
            each = latent + config.qk_rope_head_dim if latent else 2 * view.head_dim * kv_heads_of(config)
        sizes.append(each * tokens * batch)
    return sizes


def footprint(
    layers: Sequence[LayerStructure],
    config: Any,
    kept: Sequence[LayerPlan],
    sizes: tuple[int, int],
    itemsize: int,
    beside: int = 0,
) -> dict[str, Any]:
    """``memory_bytes`` by context, of weights and the KV cache of one sequence, and ``flops_per_token``: two operations
    per active parameter but those of an input embedding of its own, which is looked up, without attention's products.

    Args:
        layers, config: of the dense model; ``kept``: of every layer.
        sizes: parameters that are left, and those of them that one token passes.
        itemsize: bytes of a number in the file, and in the cache.
        beside: bytes of what is written with the text model.
    """
    left, active = sizes
    longest = getattr(config, "max_position_embeddings", None) or max(CONTEXTS)
    contexts = sorted({min(one, longest) for one in CONTEXTS})
    memory = {one: beside + memory_bytes(left, layers, kept, config, one, 1, itemsize) for one in contexts}
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return {"memory_bytes": memory, "flops_per_token": 2 * (active - embedding)}
