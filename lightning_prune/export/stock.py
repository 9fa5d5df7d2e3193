"""A per-layer checkpoint as one that any tool knows: every layer as wide as the widest, by zeros."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.checkpoint.cut import pruned_config
from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.models.checkpoint import Checkpoint, meta_model, skeleton
from lightning_prune.models.families import count_parameters, family_of, rows_of
from lightning_prune.models.layered import LayeredModel
from lightning_prune.models.sources import Source
from lightning_prune.support.errors import UserError


@dataclass(frozen=True)
class Padded:
    """Parameters of the per-layer model, of its padded form, and of as many layers of the dense model."""

    pruned: int
    padded: int
    dense: int

    def sentence(self) -> str:
        """How much of the saving is lost."""
        saved, back = self.dense - self.pruned, self.padded - self.pruned
        share = f"{100 * back / saved:.0f} %" if saved else "nothing"
        return (
            f"{self.pruned:,} parameters became {self.padded:,}: {back:,} zeros, which give back {share} of what "
            f"pruning took out of these layers ({saved:,})."
        )


def write_stock(
    checkpoint: Checkpoint, folder: Path, card: str, progress: Callable[[int, int], None] = lambda *_: None
) -> Padded:
    """Write the model as a stock checkpoint with the same logits, one layer in memory at a time.

    Args:
        checkpoint: with a width per layer.
        folder: takes its name when it is complete, and what stood there is replaced then.
        card: text of ``README.md``.
        progress: told the number of every layer that has been written, and how many there are.

    Raises:
        UserError: the model is stock already, or zeros would change what it computes; or the folder cannot be written.
        CheckpointError: what was written, read back, is not what was meant.
    """
    net, source = checkpoint.skeleton(), checkpoint.source()
    config: Any = net.config
    if not config.is_heterogeneous:
        raise UserError(
            f"--format stock: every layer of '{checkpoint.pretrained}' has the same widths, so it is a stock "
            "checkpoint already. Use the folder as it is."
        )
    wide = skeleton(stock_config(config))
    try:
        padded = PaddedSource(source, net, wide)
        model = LayeredModel(wide, padded, checkpoint.stored_dtype, torch.device("cpu"), "layer")
        write_checkpoint(
            model,
            folder,
            beside=checkpoint,
            card=card,
            progress=lambda layer: progress(layer, model.num_layers),
        )
        model.close()
    finally:
        source.close()
    dense = count_parameters(meta_model(_dense(config)))
    return Padded(count_parameters(net), count_parameters(wide), dense)


class PaddedSource:
    """Gives every parameter of the wide model: that of the narrow one with zeros behind it, or zeros alone.

    Zeros stand behind every role's rows or columns, also where several roles share one matrix. That is right for KV
    heads that serve query heads in order, and for norms that do not see the widths.

    Args:
        narrow: gives the parameters that are there.
        net, wide: both models on the meta device; parameters of the same name belong together.

    Raises:
        UserError: a parameter that is no projection depends on the widths.
    """

    def __init__(self, narrow: Source, net: nn.Module, wide: nn.Module) -> None:
        self.narrow = narrow
        self._there: Mapping[str, nn.Parameter] = dict(net.named_parameters(remove_duplicate=False))
        self._wide: Mapping[str, nn.Parameter] = dict(wide.named_parameters(remove_duplicate=False))
        config: Any = net.config
        self._family, self._config, self._wide_config = family_of(config), config, wide.config
        for name, parameter in self._wide.items():
            there = self._there.get(name)
            if there is not None and there.shape != parameter.shape and not self._place(name)[1]:
                raise UserError(
                    f"--format stock: {name!r} sees all heads of its layer at once: zeros at its end would change "
                    f"the model. The family '{self._family.model_type}' cannot be padded; serve the folder itself."
                )

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """See ``models.sources.Source``."""
        found = self.narrow.read([name for name in names if name in self._there], dtype, device)
        for name in names:
            shape, narrow = self._wide[name].shape, found.get(name)
            if narrow is None:
                found[name] = torch.zeros(shape, dtype=dtype or torch.float32, device=device)
            elif narrow.shape != shape:
                padded = torch.zeros(shape, dtype=narrow.dtype, device=device)
                for behind, part in zip(self._parts(name, padded, True), self._parts(name, narrow, False), strict=True):
                    behind[tuple(slice(0, size) for size in part.shape)] = part
                found[name] = padded
        return {name: found[name] for name in names}

    def _place(self, name: str) -> tuple[int, list[str]]:
        """The layer of a parameter, and the roles that it holds, none where it is no projection."""
        layer, _, path = name.removeprefix(f"{self._family.layers}.").partition(".")
        return (int(layer), self._family.roles_at(path.rpartition(".")[0])) if layer.isdecimal() else (-1, [])

    def _parts(self, name: str, whole: Tensor, wide: bool) -> Sequence[Tensor]:
        """Views of the rows of every role that ``whole`` holds."""
        layer, roles = self._place(name)
        if len(roles) == 1:
            return [whole]
        rows = rows_of(self._wide_config if wide else self._config.per_layer_config[layer])
        return whole.split([rows[role] for role in roles])  # type: ignore[no-any-return, no-untyped-call]


def stock_config(config: Any) -> Any:
    """The config of the padded model: the widest attention and the widest MLP in every layer, or the next wider
    attention that the family's config can say."""
    dense, layers = _dense(config), config.per_layer_config
    channels = max((own.intermediate_size for own in layers if "mlp" not in own.skip), default=1)
    least = 1 if family_of(config).whole_attention is None else dense.num_key_value_heads
    widest = max((own.num_key_value_heads for own in layers if "attention" not in own.skip), default=least)
    for kv_heads in range(widest, dense.num_key_value_heads + 1):
        kept = [LayerPlan(i, list(range(kv_heads)), list(range(channels))) for i in range(config.num_hidden_layers)]
        plan = PruningPlan("", None, 0.0, {"dense": 0, "pruned": 0}, None, "", kept)
        found = pruned_config(dense, plan)
        if not found.is_heterogeneous:
            return found
    raise AssertionError("the dense number of heads is one that the config can say")


def _dense(config: Any) -> Any:
    """The config of as many layers of the dense widths, which are the global ones."""
    dense = copy.deepcopy(config)
    dense.per_layer_config = None
    for name in ("auto_map", "how_to_load", "allow_global_per_layer_attribute_access"):
        dense.__dict__.pop(name, None)
    return dense
