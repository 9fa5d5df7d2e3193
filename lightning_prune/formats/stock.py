"""A per-layer checkpoint as one that any tool knows: every layer as wide as the widest, by zeros."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.checkpoint.cut import layout_of, pruned_config
from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.models.checkpoint import Checkpoint, meta_model, skeleton
from lightning_prune.models.families import (
    count_parameters,
    family_of,
    kv_heads_of,
    layer_configs,
    shapes_of,
    uniform_config,
)
from lightning_prune.models.layered import LayeredModel
from lightning_prune.models.sources import Source
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress


def write_stock(checkpoint: Checkpoint, folder: Path, card: str, progress: Progress) -> str:
    """``export`` for the format stock, with the text ``card`` of ``README.md``; the logits stay the same.

    Raises:
        UserError: the model is stock already, or the folder cannot be written.
        CheckpointError: what was written, read back, is not what was meant.
    """
    net, source = checkpoint.skeleton(), checkpoint.source()
    config: Any = net.config
    if layout_of(config) == "stock":
        raise UserError(
            f"--format stock: every layer of '{checkpoint.pretrained}' has the same widths, so it is a stock "
            "checkpoint already. Use the folder as it is."
        )
    wide, layers = skeleton(stock_config(config)), config.num_hidden_layers

    def show(layer: int) -> None:
        progress.advance("padding", 1, f"layer {layer + 1} of {layers}")

    progress.expect("padding", layers)
    try:
        padded = PaddedSource(source, net, wide)
        model = LayeredModel(wide, padded, checkpoint.stored_dtype, torch.device("cpu"), "layer")
        write_checkpoint(model, folder, beside=checkpoint, card=card, progress=show)
        model.close()
    finally:
        source.close()
    progress.finish("padding")
    before, after, dense = (count_parameters(one) for one in (net, wide, meta_model(uniform_config(config))))
    saved, back = dense - before, after - before
    share = f"{100 * back / saved:.0f} %" if saved else "nothing"
    return (
        f"{before:,} parameters became {after:,}: {back:,} zeros, which give back {share} of what "
        f"pruning took out of these layers ({saved:,}). Pruned with --model.allocation uniform, layers need none."
    )


class PaddedSource:
    """Gives every parameter of the wide model: that of the narrow one followed by zeros, or zeros alone.

    Every role's rows or columns are padded, also where several roles share one matrix. That keeps the logits, because
    KV heads serve query heads in order and no norm of these families sees the widths.

    ``narrow`` gives the parameters of ``net``, which like ``wide`` is on the meta device.
    """

    def __init__(self, narrow: Source, net: nn.Module, wide: nn.Module) -> None:
        self.narrow, self._net, self._wide = narrow, net, wide
        self._there = {name for name, _ in net.named_parameters(remove_duplicate=False)}

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """Read parameters, padded with zeros, as ``models.sources.Source`` does."""
        tensors = self.narrow.read([name for name in names if name in self._there], dtype, device)
        for name in names:
            shape, narrow = self._wide.get_parameter(name).shape, tensors.get(name)
            if narrow is None:
                tensors[name] = torch.zeros(shape, dtype=dtype or torch.float32, device=device)
            elif narrow.shape != shape:
                tensors[name] = self._padded(name, narrow, torch.zeros(shape, dtype=narrow.dtype, device=device))
        return tensors

    def _padded(self, name: str, narrow: Tensor, padded: Tensor) -> Tensor:
        config: Any = self._net.config
        family = family_of(config)
        layer, _, path = name.removeprefix(f"{family.layers}.").partition(".")
        roles = family.roles_at(path.rpartition(".")[0])
        old, new = [len(narrow)], [len(padded)]
        if len(roles) > 1:
            old_shapes, new_shapes = shapes_of(config.per_layer_config[int(layer)]), shapes_of(self._wide.config)
            old, new = ([of[role][0] for role in roles] for of in (old_shapes, new_shapes))
        for view, part in zip(padded.split(new), narrow.split(old), strict=True):  # type: ignore[no-untyped-call]
            view[tuple(slice(0, size) for size in part.shape)] = part
        return padded


def stock_config(config: Any) -> Any:
    """The config of the padded model: the widest attention and the widest MLP in every layer, or the next wider
    attention that the family's config can say."""
    dense, layers, family = uniform_config(config), config.per_layer_config, family_of(config)
    channels = max((getattr(own, family.width) for own in layers if "mlp" not in own.skip), default=1)
    groups = [kv_heads_of(own) for own in layer_configs(dense)]
    most = max(groups)  # of a family whose own layers differ, the others have as large a share of theirs
    least = 1 if family.whole_attention is None else most
    there = [(kv_heads_of(own), of) for own, of in zip(layers, groups, strict=True) if "attention" not in own.skip]
    widest = max((-(-kept * most // of) for kept, of in there), default=least)
    for kv_heads in range(widest, most + 1):
        kept = []
        for index, of in enumerate(groups):
            units = {Block.ATTENTION: list(range(-(-kv_heads * of // most))), Block.MLP: list(range(channels))}
            blocks = family.blocks_of(config, index)
            kept.append(LayerPlan(index, {block: units.get(block, [0]) for block in blocks}))
        padded = pruned_config(dense, PruningPlan("", None, 0.0, {"dense": 0, "pruned": 0}, None, "", kept))
        if layout_of(padded) == "stock":
            return padded
    raise UserError(
        f"--format stock: a config of family '{config.model_type}' cannot say the kinds of the layers that are left "
        f"({', '.join(config.layer_types)}), however wide they are. Use the folder as it is."
    )
