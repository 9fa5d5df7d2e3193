"""What a run shows in TensorBoard, under the same tags for every method, so that runs overlay."""

from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter

from lightning_prune.methods.scores import BLOCKS, Block, Scores
from lightning_prune.support.escape import plain


def log_importance(writer: SummaryWriter, scores: Scores) -> None:
    """Importance per layer as scalars whose step is the layer, score histograms, and the kept-fraction map.

    ``importance/<block>`` is the block's share of the model's whole importance, so methods of different scales
    overlay; ``score/<block>`` is the mean score of the block's units in the method's own unit.
    """
    total = float(scores.importance.sum()) or 1.0
    for layer, importance in enumerate(torch.bincount(scores.layer, weights=scores.importance).tolist()):
        writer.add_scalar("importance/layer", importance / total, layer)
    for (layer, block), rows in _blocks(scores).items():
        if block != "layer":
            writer.add_scalar(f"importance/{block}", float(scores.importance[rows].sum()) / total, layer)
            writer.add_histogram(f"log10 score/{block}", _log10(scores.score[rows]), layer)
        writer.add_scalar(f"score/{block}", float(scores.score[rows].mean()), layer)
        writer.add_scalar(f"kept fraction/{block}", float((~scores.pruned[rows]).double().mean()), layer)
    writer.add_figure("kept fraction", kept_fraction_figure(scores))


def kept_fraction(scores: Scores) -> tuple[list[str], torch.Tensor]:
    """Block names and the kept fraction ``[blocks, L]`` of every layer, fp64; NaN where a layer has no such block."""
    rows = _blocks(scores)
    names = [block for block in BLOCKS if any(block == other for _, other in rows)]
    kept = torch.full((len(names), int(scores.layer.max()) + 1), torch.nan, dtype=torch.float64)
    for (layer, block), units in rows.items():
        kept[names.index(block), layer] = (~scores.pruned[units]).double().mean()
    return list(names), kept


def kept_fraction_figure(scores: Scores) -> Figure:
    """Heat map, layer × block, of the share of units that stay."""
    names, kept = kept_fraction(scores)
    figure = Figure(figsize=(max(4.0, 0.35 * kept.shape[1] + 2), 0.6 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(kept.numpy(), vmin=0, vmax=1, cmap=matplotlib.colormaps["viridis"], aspect="auto")
    axes.set_xlabel("layer")
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="kept fraction")
    return figure


def hparams(method_options: dict[str, Any], metrics: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The row of the HParams table: options that are plain values, and final perplexities and ratio."""
    options = {key: value for key, value in method_options.items() if isinstance(value, (str, int, float, bool))}
    results = {"hparams/achieved ratio": float(metrics["pruning_ratio"]["achieved"])}
    for name, values in metrics["perplexity"].items():
        results[f"hparams/perplexity {plain(name)}"] = float(values["pruned"])
    return options, results


def _blocks(scores: Scores) -> dict[tuple[int, Block], torch.Tensor]:
    """Rows of every block that is there, in one pass over the table however many layers it has."""
    block = scores.layer * len(BLOCKS) + scores.block
    order = torch.argsort(block, stable=True)
    found, counts = torch.unique_consecutive(block[order], return_counts=True)
    rows = torch.split(order, counts.tolist())
    return {
        (key // len(BLOCKS), BLOCKS[key % len(BLOCKS)]): part for key, part in zip(found.tolist(), rows, strict=True)
    }


def _log10(values: torch.Tensor) -> torch.Tensor:
    return torch.log10(values.clamp_min(1e-30))
